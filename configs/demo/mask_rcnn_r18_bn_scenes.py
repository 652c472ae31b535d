_base_ = '_base_/mask_rcnn_r18_scenes.py'
model = dict(backbone=dict(norm_cfg=dict(type='BN')))

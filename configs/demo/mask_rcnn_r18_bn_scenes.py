_base_ = '_base_/mask_rcnn_r18_scenes.py'
norm_cfg = dict(type='BN')
model = dict(backbone=dict(norm_cfg=norm_cfg), neck=dict(norm_cfg=norm_cfg))

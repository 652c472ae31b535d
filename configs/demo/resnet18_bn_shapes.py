_base_ = '_base_/resnet18_shapes.py'
model = dict(backbone=dict(norm_cfg=dict(type='BN')))

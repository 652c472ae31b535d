_base_ = ['mmpretrain::_base_/models/resnet50.py', '../_base_/imagenet.py']

model = dict(backbone=dict(norm_cfg=dict(type='BN')))

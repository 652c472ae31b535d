_base_ = ['mmpretrain::_base_/models/resnet101.py', '../_base_/imagenet.py']

model = dict(backbone=dict(norm_cfg=dict(type='BN')))
auto_scale_lr = dict(base_batch_size=8 * 256)

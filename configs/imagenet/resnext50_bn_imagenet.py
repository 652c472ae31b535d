_base_ = ['mmpretrain::_base_/models/resnext50_32x4d.py', '../_base_/imagenet.py']

model = dict(backbone=dict(norm_cfg=dict(type='BN')))
auto_scale_lr = dict(base_batch_size=8 * 256)

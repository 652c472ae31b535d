_base_ = ['mmpretrain::_base_/models/resnet101_cifar.py', '../_base_/cifar100.py']

model = dict(backbone=dict(norm_cfg=dict(type='BN')), head=dict(num_classes=100))

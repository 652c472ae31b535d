_base_ = ['mmpretrain::_base_/models/resnet50_cifar.py', '../_base_/cifar100.py']

model = dict(backbone=dict(norm_cfg=dict(type='BN')), head=dict(num_classes=100))

_base_ = ['../_base_/vgg_cifar.py', '../_base_/cifar100.py']

model = dict(backbone=dict(depth=13, norm_cfg=dict(type='BN')), head=dict(num_classes=100))

_base_ = ['mmpretrain::resnet/resnet18_8xb16_cifar10.py', '../_base_/hooks.py']

model = dict(backbone=dict(norm_cfg=dict(type='UBN', fct=0.15)))

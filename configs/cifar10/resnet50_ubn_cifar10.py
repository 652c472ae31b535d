_base_ = 'resnet50_bn_cifar10.py'

model = dict(backbone=dict(norm_cfg=dict(type='UBN', fct=0.15)))

_base_ = 'resnet34_bn_cifar10.py'

model = dict(backbone=dict(norm_cfg=dict(type='UBN', fct=0.15)))

_base_ = 'resnet101_bn_imagenet.py'

model = dict(backbone=dict(norm_cfg=dict(type='UBN', fct=0.15)))

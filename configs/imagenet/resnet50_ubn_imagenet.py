_base_ = 'resnet50_bn_imagenet.py'

model = dict(backbone=dict(norm_cfg=dict(type='UBN', fct=0.15)))

_base_ = ['mmpretrain::resnet/resnet50_8xb32_in1k.py', '../_base_/hooks.py']

model = dict(backbone=dict(norm_cfg=dict(type='UBN', fct=0.15)))

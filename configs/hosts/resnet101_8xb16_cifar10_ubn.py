_base_ = 'mmpretrain::resnet/resnet101_8xb16_cifar10.py'

custom_imports = dict(imports=['mmubn'], allow_failed_imports=False)

model = dict(backbone=dict(norm_cfg=dict(type='UBN', fct=0.15)))

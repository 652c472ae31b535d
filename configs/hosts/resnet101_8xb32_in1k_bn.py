_base_ = 'mmpretrain::resnet/resnet101_8xb32_in1k.py'

custom_imports = dict(imports=['mmubn'], allow_failed_imports=False)

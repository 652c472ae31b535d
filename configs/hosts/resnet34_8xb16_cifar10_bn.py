_base_ = 'mmpretrain::resnet/resnet34_8xb16_cifar10.py'

custom_imports = dict(imports=['mmubn'], allow_failed_imports=False)

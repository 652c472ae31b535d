_base_ = ['mmpretrain::resnet/resnet50_8xb16_cifar10.py', '../_base_/hooks.py']

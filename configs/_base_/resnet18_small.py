# ResNet-18 for a CPU: a quarter of the channels, and a first stage that halves the size.
_base_ = 'mmpretrain::_base_/models/resnet18_cifar.py'

model = dict(
    backbone=dict(
        stem_channels=16, base_channels=16, strides=(2, 2, 2, 1), norm_cfg=dict(type='BN')
    ),
    head=dict(in_channels=128),
)

# A small ResNet on drawn images of shapes: a few minutes on a CPU, no download.
_base_ = [
    'mmpretrain::_base_/models/resnet18_cifar.py',
    'mmpretrain::_base_/datasets/cifar10_bs16.py',
    'mmpretrain::_base_/schedules/cifar10_bs128.py',
    '../../_base_/classification.py',
]

# Strides that halve the work of every stage; 14 of 20 norm layers see 8x8 or less.
model = dict(
    backbone=dict(stem_channels=16, base_channels=16, strides=(2, 2, 2, 1)),
    head=dict(num_classes=8, in_channels=128),
)
data_preprocessor = dict(num_classes=8, mean=[127.5] * 3, std=[63.75] * 3)

train_dataloader = dict(
    batch_size=64,
    num_workers=1,
    dataset=dict(
        _delete_=True,
        type='Shapes',
        split='train',
        count=6400,
        pipeline=[
            dict(type='RandomFlip', prob=0.5, direction='horizontal'),
            dict(type='PackInputs'),
        ],
    ),
)
val_dataloader = dict(
    batch_size=128,
    num_workers=1,
    dataset=dict(
        _delete_=True,
        type='Shapes',
        split='test',
        count=2000,
        pipeline=[dict(type='PackInputs')],
    ),
)
test_dataloader = val_dataloader

train_cfg = dict(max_epochs=10)
param_scheduler = dict(
    _delete_=True,
    type='CosineAnnealingLR',
    eta_min_ratio=0.01,
    by_epoch=True,
    begin=0,
    end=10,
    convert_to_iter_based=True,
)
default_hooks = dict(logger=dict(interval=25))
custom_hooks = [dict(type='CondensationHook')]
randomness = dict(seed=0)

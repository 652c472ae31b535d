# A small ResNet on drawn images of shapes: a few minutes on a CPU, no download.
_base_ = [
    'mmpretrain::_base_/datasets/cifar10_bs16.py',
    'mmpretrain::_base_/schedules/cifar10_bs128.py',
    '../../_base_/resnet18_small.py',
    '../../_base_/classification.py',
]

model = dict(head=dict(num_classes=8))
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

train_cfg = dict(max_epochs=8)
optim_wrapper = dict(optimizer=dict(lr=0.05))
param_scheduler = dict(
    _delete_=True,
    type='CosineAnnealingLR',
    eta_min_ratio=0.01,
    by_epoch=True,
    begin=0,
    end=8,
    convert_to_iter_based=True,
)
auto_scale_lr = dict(base_batch_size=64)
default_hooks = dict(logger=dict(interval=25))
custom_hooks = [dict(type='CondensationHook'), *_base_.custom_hooks]
randomness = dict(seed=0)

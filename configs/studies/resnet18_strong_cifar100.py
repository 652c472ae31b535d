# The strong recipe of `tools/reproduce.py run strong-recipe`: all of CIFAR-100, half of ResNet-18's
# channels, a first stage that halves the size. Learning rate and weight decay are tuned for BN.
_base_ = ['../_base_/resnet18_small.py', '../_base_/cifar100.py']

epochs = 24
model = dict(
    backbone=dict(stem_channels=32, base_channels=32, strides=(2, 2, 2, 2)),
    head=dict(
        in_channels=256,
        num_classes=100,
        loss=dict(_delete_=True, type='LabelSmoothLoss', label_smooth_val=0.1),
    ),
)
train_dataloader = dict(num_workers=0, persistent_workers=False)
val_dataloader = dict(num_workers=0, persistent_workers=False)
test_dataloader = val_dataloader
optim_wrapper = dict(optimizer=dict(nesterov=True))
train_cfg = dict(max_epochs=epochs, val_interval=2)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=400),
    dict(
        type='CosineAnnealingLR',
        eta_min_ratio=0.001,
        by_epoch=True,
        begin=0,
        end=epochs,
        convert_to_iter_based=True,
    ),
]
auto_scale_lr = dict(base_batch_size=128)
default_hooks = dict(checkpoint=dict(interval=1))
custom_hooks = [dict(type='CondensationHook'), *_base_.custom_hooks]

# The backbone of faster_rcnn_r18_cifar_scenes.py, pretrained on all of CIFAR-100.
_base_ = ['../_base_/resnet18_small.py', '../_base_/cifar100.py']

epochs = 16
model = dict(backbone=dict(strides=(2, 2, 2, 2)), head=dict(num_classes=100))
train_dataloader = dict(num_workers=0, persistent_workers=False)
val_dataloader = dict(num_workers=0, persistent_workers=False)
test_dataloader = val_dataloader
train_cfg = dict(max_epochs=epochs, val_interval=4)
param_scheduler = [
    dict(
        type='CosineAnnealingLR',
        eta_min_ratio=0.01,
        by_epoch=True,
        begin=0,
        end=epochs,
        convert_to_iter_based=True,
    ),
]
auto_scale_lr = dict(base_batch_size=128)
default_hooks = dict(checkpoint=dict(interval=1))

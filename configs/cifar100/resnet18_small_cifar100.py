# Not the paper's: 20,000 images and 10 epochs of a small network, minutes on a CPU. Other
# norms by --cfg-options model.backbone.norm_cfg.type=UBN.
_base_ = ['../_base_/resnet18_small.py', '../_base_/cifar100.py']

model = dict(head=dict(num_classes=100))
train_dataloader = dict(num_workers=1, dataset=dict(indices=20000))
val_dataloader = dict(num_workers=1)
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
auto_scale_lr = dict(base_batch_size=128)
custom_hooks = [dict(type='CondensationHook'), *_base_.custom_hooks]

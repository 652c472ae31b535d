# Not the paper's: 5,000 images and 8 epochs of a small network, minutes on a CPU core. It is
# what `tools/reproduce.py --small` trains, with each row's norm.
_base_ = ['../_base_/resnet18_small.py', '../_base_/cifar10.py']

# Workers would take the cores from the trainings that run side by side.
train_dataloader = dict(
    batch_size=64, num_workers=0, persistent_workers=False, dataset=dict(indices=5000)
)
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(indices=5000))
test_dataloader = val_dataloader
train_cfg = dict(max_epochs=8)
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
custom_hooks = [dict(type='CondensationHook'), *_base_.custom_hooks]

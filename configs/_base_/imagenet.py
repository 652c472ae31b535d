# Section 4.1.1 of the paper: 90 epochs, 256 images on each of 4 GPUs (ResNet-50) or 8.
_base_ = [
    'mmpretrain::_base_/datasets/imagenet_bs32.py',
    'mmpretrain::_base_/schedules/imagenet_bs256.py',
    'classification.py',
]

train_dataloader = dict(batch_size=256, num_workers=8)
val_dataloader = dict(batch_size=256, num_workers=8)
test_dataloader = val_dataloader

# Learning rate 0.1, momentum 0.9 and weight decay 1e-4 are those of the schedule.
train_cfg = dict(max_epochs=90)
param_scheduler = dict(milestones=[30, 60])
auto_scale_lr = dict(base_batch_size=4 * 256)

# Section 4.1.3 of the paper: 200 epochs, 128 images on each of 3 GPUs.
_base_ = [
    'mmpretrain::_base_/datasets/cifar10_bs16.py',
    'mmpretrain::_base_/schedules/cifar10_bs128.py',
    'classification.py',
]

train_dataloader = dict(batch_size=128, dataset=dict(download=False))
val_dataloader = dict(batch_size=128, dataset=dict(download=False))
test_dataloader = val_dataloader
val_evaluator = dict(topk=(1, 5))
test_evaluator = val_evaluator

# Learning rate 0.1, momentum 0.9, weight decay 1e-4 and the division by ten at epochs 100
# and 150 are those of the schedule.
auto_scale_lr = dict(base_batch_size=3 * 128)

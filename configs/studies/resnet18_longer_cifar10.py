# What the studies longer-training and longer-small-batches train for 32 epochs in place of 8.
_base_ = '../cifar10/resnet18_small_cifar10.py'

train_cfg = dict(max_epochs=32)
param_scheduler = dict(end=32)

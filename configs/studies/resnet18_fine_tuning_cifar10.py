# What `tools/reproduce.py run fine-tuning` trains: the network of resnet18_pretraining_cifar100.py
# on 5,000 images of CIFAR-10.
_base_ = '../cifar10/resnet18_small_cifar10.py'

# Those of the pretraining.
data_preprocessor = dict(mean=[129.304, 124.070, 112.434], std=[68.170, 65.392, 70.418])
model = dict(backbone=dict(strides=(2, 2, 2, 2)))

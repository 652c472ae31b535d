_base_ = 'resnet50_bn_cifar100.py'

# With a scale and an offset per channel, as the other norms have; mmcv leaves them out.
model = dict(backbone=dict(norm_cfg=dict(type='IN', affine=True)))

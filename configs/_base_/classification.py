# What all classification recipes share.
_base_ = ['mmpretrain::_base_/default_runtime.py', 'hooks.py']

env_cfg = dict(cudnn_benchmark=True)
default_hooks = dict(checkpoint=dict(interval=5, max_keep_ckpts=1))

# hooks.py for a config that freezes the statistics on purpose: UBNCheckHook does not warn of it.
_base_ = 'hooks.py'

custom_hooks = [dict(type='UBNCheckHook', frozen_statistics=True), *_base_.custom_hooks[1:]]

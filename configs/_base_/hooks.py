# What every training of ours has beside its recipe. Another config gets it by
# `_base_ = ['mmdet::...', 'mmubn::_base_/hooks.py']`; one with hooks of its own adds to them:
# `custom_hooks = [dict(type='CondensationHook'), *_base_.custom_hooks]`.
custom_imports = dict(imports=['mmubn'], allow_failed_imports=False)

custom_hooks = [
    # UBNCheckHook stays the first: hooks_frozen.py replaces it.
    dict(type='UBNCheckHook'),  # says how many UBN layers train; nothing without any
    dict(type='NonFiniteHook'),  # stops before a step with a gradient that is NaN or infinite
    dict(type='EpochSeedHook'),  # with randomness.seed: a resumed run draws what a whole one draws
]

"""Puts the layers and hooks into mmengine's root registry, where mmdet and mmpretrain look too.

``mmcv.cnn.build_norm_layer`` searches the scope of the running config first and
the root next, so one entry serves every OpenMMLab repository. ``force=True``
makes a reload harmless.
"""

from functools import partial
from importlib import import_module

from mmengine.registry import HOOKS, MODELS

from .layers import BNET, IEBN, RBN, UBN

for layer in (BNET, IEBN, RBN, UBN):
    MODELS.register_module(module=layer, force=True)


def _build_hook(name, **options):
    # mmengine.hooks takes a second to import and OpenCV with it; a Runner has it anyway.
    return getattr(import_module('mmubn.hooks'), name)(**options)


for name in ('CondensationHook', 'UBNCheckHook'):
    HOOKS.register_module(name=name, module=partial(_build_hook, name), force=True)

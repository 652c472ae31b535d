"""Puts the types into mmengine's root registry, where mmdet and mmpretrain look too.

``mmcv.cnn.build_norm_layer`` searches the scope of the running config first and
the root next, so one entry serves every OpenMMLab repository. ``force=True``
makes a reload harmless.
"""

from functools import partial
from importlib import import_module

from mmengine.config.utils import MODULE2PACKAGE
from mmengine.registry import DATASETS, HOOKS, MODELS

from . import layers
from .flops import register_mmengine

for name in layers.__all__:
    MODELS.register_module(module=getattr(layers, name), force=True)


def _build(module, name, **options):
    # mmengine.hooks takes a second to import and OpenCV with it, mmpretrain several;
    # whoever builds these has them anyway.
    return getattr(import_module(module), name)(**options)


for registry, module, names in (
    (HOOKS, 'mmubn.hooks', ('CondensationHook', 'EpochSeedHook', 'NonFiniteHook', 'UBNCheckHook')),
    (DATASETS, 'mmubn.datasets.cached_image_folder', ('CachedImageFolder',)),
    (DATASETS, 'mmubn.datasets.shapes', ('Shapes',)),
    (MODELS, 'mmubn.models', ('InceptionV4_CIFAR', 'ResNeXt_CIFAR')),
):
    for name in names:
        registry.register_module(name=name, module=partial(_build, module, name), force=True)

# What `_base_ = 'mmubn::...'` may name.
MODULE2PACKAGE['mmubn'] = 'mmubn'

register_mmengine()

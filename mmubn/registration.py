"""Puts the types into mmengine's root registry, where mmdet and mmpretrain look too.

``mmcv.cnn.build_norm_layer`` searches the scope of the running config first and
the root next, so one entry serves every OpenMMLab repository. The packages list
their types in ``__all__``. ``force=True`` makes a reload harmless.
"""

from functools import partial
from importlib import import_module

from mmengine.config.utils import MODULE2PACKAGE
from mmengine.registry import DATASETS, HOOKS, MODELS

from . import datasets, hooks, layers, models
from .flops import register_mmengine

for name in layers.__all__:
    MODELS.register_module(module=getattr(layers, name), force=True)


def find(module, name):
    """The class ``name`` of ``module``, imported now."""
    return getattr(import_module(module), name)


def build(module, name, **options):
    """Makes an object of it; it is what the registries hold.

    mmengine.hooks takes a second to import and OpenCV with it, mmpretrain several;
    whoever builds these has them anyway.
    """
    return find(module, name)(**options)


for registry, package in ((HOOKS, hooks), (DATASETS, datasets), (MODELS, models)):
    for name in package.__all__:
        builder = partial(build, package.__name__, name)
        registry.register_module(name=name, module=builder, force=True)

# What `_base_ = 'mmubn::...'` may name.
MODULE2PACKAGE['mmubn'] = 'mmubn'

register_mmengine()

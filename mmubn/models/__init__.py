"""Backbones for 32x32 images that mmpretrain lacks; :mod:`mmubn` registers each named here."""

from ..lazy import getter

_MODULES = {'InceptionV4_CIFAR': 'inception_v4_cifar', 'ResNeXt_CIFAR': 'resnext_cifar'}
__all__ = [*_MODULES]
__getattr__ = getter(__name__, _MODULES)

"""Backbones for 32x32 images that mmpretrain lacks; ``import mmubn`` imports none of them."""

from .inception_v4_cifar import InceptionV4_CIFAR
from .resnext_cifar import ResNeXt_CIFAR

__all__ = ['InceptionV4_CIFAR', 'ResNeXt_CIFAR']

"""Data that the package makes itself. Nothing here is imported by ``import mmubn``."""

from .scenes import CLASSES, make_scenes

__all__ = ['CLASSES', 'make_scenes']

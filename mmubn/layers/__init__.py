"""Norm layers. They need torch alone; :mod:`mmubn` registers them with OpenMMLab."""

from .ubn import UBN

__all__ = ['UBN']

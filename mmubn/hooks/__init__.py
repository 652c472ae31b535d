"""Hooks for mmengine's Runner; :mod:`mmubn` registers them."""

from .condensation_hook import CondensationHook
from .ubn_check_hook import UBNCheckHook

__all__ = ['CondensationHook', 'UBNCheckHook']

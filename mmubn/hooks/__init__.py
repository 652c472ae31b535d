"""Hooks for mmengine's Runner; :mod:`mmubn` registers them."""

from .condensation_hook import CondensationHook
from .epoch_seed_hook import EpochSeedHook
from .non_finite_hook import NonFiniteHook
from .ubn_check_hook import UBNCheckHook

__all__ = ['CondensationHook', 'EpochSeedHook', 'NonFiniteHook', 'UBNCheckHook']

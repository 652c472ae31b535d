"""Hooks for mmengine's Runner; :mod:`mmubn` registers each that is named here."""

from ..lazy import getter

# What mmengine.hooks imports takes a second.
_MODULES = {
    'CondensationHook': 'condensation_hook',
    'EpochSeedHook': 'epoch_seed_hook',
    'NonFiniteHook': 'non_finite_hook',
    'UBNCheckHook': 'ubn_check_hook',
}
__all__ = [*_MODULES]
__getattr__ = getter(__name__, _MODULES)

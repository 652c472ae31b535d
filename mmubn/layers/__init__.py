"""Norm layers. They need torch alone; :mod:`mmubn` registers them with OpenMMLab."""

from .bnet import BNET
from .iebn import IEBN
from .rbn import RBN
from .sync_ubn import SyncUBN
from .ubn import UBN

__all__ = ['UBN', 'SyncUBN', 'RBN', 'BNET', 'IEBN']

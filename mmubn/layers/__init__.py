"""Norm layers. They need torch alone; :mod:`mmubn` registers them with OpenMMLab."""

from .bnet import BNET
from .iebn import IEBN
from .rbn import RBN
from .sync_ubn import SyncUBN
from .ubn import UBN

# The types whose statistics are those of all processes, by the type of one process.
SYNCHRONISED = {UBN: SyncUBN}

__all__ = ['UBN', 'SyncUBN', 'RBN', 'BNET', 'IEBN']

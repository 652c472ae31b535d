"""Which code makes the passes over the large tensors."""

import functools
import importlib.util
import logging
import os
from types import ModuleType

import torch
from torch import Tensor

from . import passes_torch
from .utils import tracing

logger = logging.getLogger('mmubn')

BACKENDS = ('auto', 'torch', 'triton')
# What the kernels unroll; wider ones would spill registers.
_TRITON_KERNEL_SIZES = (1, 3, 5, 7)
# The oldest that was seen to compile them: they carry tuples through loops.
_TRITON_VERSION = (3, 3)


def choose(backend: str, x: Tensor, kernel_size: int = 1) -> ModuleType:
    """The module with the passes for ``x``.

    Args:
        backend (str): ``'torch'``; ``'triton'``; or ``'auto'``, which is Triton for
            tensors on a GPU and torch for others, in compilation and export (whose
            compilers make kernels of their own), and where Triton cannot serve, which
            it says once.
        x (Tensor): X.
        kernel_size (int): k.

    Returns:
        ModuleType: :mod:`passes_torch` or :mod:`passes_triton`, which have the same
        functions.

    Raises:
        ValueError: ``backend`` is not one of :data:`BACKENDS`.
        RuntimeError: ``'triton'`` cannot be had, with the reason.
    """
    if backend not in BACKENDS:
        raise ValueError(f'backend must be one of {", ".join(BACKENDS)}, got {backend!r}')
    if backend == 'torch' or (backend == 'auto' and (not x.is_cuda or tracing())):
        return passes_torch
    if not x.numel():  # no program to launch
        return passes_torch
    reason = _why_not_triton(x, kernel_size)
    if not reason:
        return importlib.import_module('.passes_triton', __package__)
    if backend == 'triton':
        raise RuntimeError(f"backend='triton' cannot be used: {reason}; 'torch' and 'auto' can")
    _say_once(reason)
    return passes_torch


def _why_not_triton(x: Tensor, kernel_size: int) -> str:
    if importlib.util.find_spec('triton') is None:
        return 'triton is not installed'
    if kernel_size not in _TRITON_KERNEL_SIZES:
        sizes = ', '.join(map(str, _TRITON_KERNEL_SIZES))
        return f'its kernels have kernel_size {sizes}, not {kernel_size}'
    if not x.is_cuda and os.environ.get('TRITON_INTERPRET') != '1':
        return f'the input is on {x.device}, not on a GPU'
    if tracing():
        return 'the model is being compiled or exported'
    return _why_no_launch(x.device) if x.is_cuda else ''


@functools.cache
def _why_no_launch(device: torch.device) -> str:
    import triton

    if tuple(map(int, triton.__version__.split('.')[:2])) < _TRITON_VERSION:
        needed = '.'.join(map(str, _TRITON_VERSION))
        return f'its kernels need triton {needed}, found {triton.__version__}'
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (7, 0):
        return f'{device} is older than compute capability 7.0'
    try:  # loads its link to the driver, for which it wants a C compiler and Python.h
        triton.runtime.driver.active.get_current_device()
    except Exception as error:  # whatever a compiler, a loader or the driver raises
        return f'triton cannot start: {error}'
    return ''


@functools.cache
def _say_once(reason: str) -> None:
    logger.warning("mmubn's Triton kernels are not used: %s", reason)

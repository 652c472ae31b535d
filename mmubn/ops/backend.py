"""Which code makes a step: the backends there are, and the choice between them."""

import functools
import logging
from typing import Dict, List, Tuple

import torch
from torch import Tensor

from .cpp_backend import CppBackend
from .interface import Backend
from .torch_backend import TorchBackend
from .triton_backend import TritonBackend
from .utils import tracing, watching

logger = logging.getLogger('mmubn')

TORCH, CPP, TRITON = TorchBackend(), CppBackend(), TritonBackend()
_NAMED: Dict[str, Backend] = {backend.name: backend for backend in (TORCH, CPP, TRITON)}
# What 'auto' takes on a kind of device, where it can serve; plain torch elsewhere.
_BY_DEVICE: Dict[str, Backend] = {'cpu': CPP, 'cuda': TRITON}

BACKENDS = ('auto', *_NAMED)
"""What ``backend=`` of a layer may be."""

_DEVICES = dict(cpu='CPU', cuda='GPU')


def check_name(name: str) -> None:
    """Raises a ``ValueError`` if ``name`` is not one of :data:`BACKENDS`."""
    if name not in BACKENDS:
        raise ValueError(f'backend must be one of {", ".join(BACKENDS)}, got {name!r}')


def choose(name: str, x: Tensor, kernel_size: int = 3) -> Backend:
    """The backend for ``x``.

    Args:
        name (str): One of :data:`BACKENDS`. ``'auto'`` is Triton on a GPU, the compiled C++
            on the CPU, and plain torch elsewhere and where those cannot serve, which
            is said once.
        x (Tensor): X.
        kernel_size (int): k.

    Returns:
        Backend: Plain torch for an empty ``x`` and where torch's operations are written
        down (export, tracing), whatever the name; with ``'auto'`` also under a dispatch
        mode of torch, which counts operations or makes fake tensors and has to see them.

    Raises:
        ValueError: ``name`` is not one of :data:`BACKENDS`.
        RuntimeError: The backend of that name cannot serve, with the reason.
    """
    check_name(name)
    backend = _BY_DEVICE.get(x.device.type, TORCH) if name == 'auto' else _NAMED[name]
    if backend is TORCH or not x.numel() or tracing():
        return TORCH
    if name == 'auto' and watching():
        return TORCH
    reason = backend.why_not(x, kernel_size)
    if not reason:
        return backend
    if name != 'auto':
        raise RuntimeError(f"backend='{name}' cannot be used: {reason}; 'torch' and 'auto' can")
    _say_once(backend.name, reason)
    return TORCH


def describe() -> List[Tuple[str, bool, str]]:
    """For each backend its name, whether it can serve here, and where or why not, in one line."""
    rows = [(TORCH.name, True, 'any device, any dtype, any kernel size')]
    for device, backend in _BY_DEVICE.items():
        try:
            x = torch.zeros(1, 1, 1, 1, device=device)
        except Exception:  # torch raises many kinds: not built for it, no driver, no device
            rows.append((backend.name, False, f'there is no {_DEVICES.get(device, device)}'))
            continue
        reason = backend.why_not(x, 3)
        kind = torch.cuda.get_device_name() if device == 'cuda' else _DEVICES.get(device, device)
        rows.append((backend.name, not reason, reason or f"'auto' takes it on the {kind}"))
    return rows


@functools.cache
def _say_once(name: str, reason: str) -> None:
    logger.warning('plain torch replaces the %s backend of mmubn: %s', name, reason)

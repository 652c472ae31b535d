"""A step on a GPU, by Triton kernels. Importing it needs no Triton, using it does."""

import functools
import importlib
import importlib.util
import os
from types import ModuleType
from typing import Tuple

import torch
from torch import Tensor

from .torch_backend import PassSums, Rest, TorchBackend

# What the kernels unroll; wider ones would spill registers.
KERNEL_SIZES = (1, 3, 5, 7)
# The oldest that was seen to compile them: they carry tuples through loops.
_TRITON_VERSION = (3, 3)


class TritonBackend(TorchBackend):
    """The :class:`mmubn.ops.interface.Backend` for GPUs, and for Triton's interpreter."""

    name = 'triton'

    @functools.cached_property
    def _kernels(self) -> ModuleType:
        return importlib.import_module('.triton_kernels', __package__)

    def why_not(self, x: Tensor, kernel_size: int) -> str:
        """See :meth:`mmubn.ops.interface.Backend.why_not`."""
        if importlib.util.find_spec('triton') is None:
            return 'triton is not installed'
        if kernel_size not in KERNEL_SIZES:
            sizes = ', '.join(map(str, KERNEL_SIZES))
            return f'its kernels have kernel_size {sizes}, not {kernel_size}'
        if x.is_cuda:
            return _why_no_launch(x.device)
        if os.environ.get('TRITON_INTERPRET') != '1':
            return f'the input is on {x.device}, not on a GPU'
        return ''

    def _image_mean(self, x: Tensor) -> Tensor:
        return self._kernels.image_mean(x)

    def _image_moments(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        return self._kernels.image_moments(x)

    def squared_sum(self, x: Tensor, weight: Tensor) -> Tensor:
        """See :meth:`mmubn.ops.interface.Backend.squared_sum`."""
        return self._kernels.squared_sum(x, weight)

    def _forward(self, x, shift, scale, taps, bias) -> Tensor:
        return self._kernels.forward(x, shift, scale, taps, bias)

    def _backward_sums(self, x, dy, shift, scale, taps) -> PassSums:
        return self._kernels.backward_sums(x, dy, shift, scale, taps)

    def _backward_input(self, x, dy, rest: Rest, slope, level, taps) -> Tensor:
        mean = rest.image_mean.contiguous()
        return self._kernels.backward_input(x, dy, mean, rest.scale, slope, level, taps, None)


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

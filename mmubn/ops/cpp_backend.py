"""A step on the CPU, by C++ that is compiled on first use: mmubn/ops/cpp/.

Each method is one call of a library with a plain C interface, the small algebra inside.
The tensors' dtype and k choose the library, see :mod:`mmubn.ops.cpp_build`.
"""

import ctypes
import functools
import struct
from typing import Any, Callable, Dict, NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn

from .cpp_build import BuildError, library
from .interface import Backend, Buffers, Parameters, Settings, Sums
from .torch_backend import TorchBackend, similarity_of_pairs
from .utils import (
    KERNEL_SIZES,
    copy_back,
    dense,
    no_kernel,
    refuse_foreign,
    statistics_dtype,
    to_fill,
)

_DTYPES = {torch.float32: 'float', torch.float64: 'double', torch.bfloat16: 'bf16'}

_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
# `Layer` and `State` of step.cpp.
_LAYER = struct.Struct('@7q1d6P')
_STATE = struct.Struct('@4q3d5P')


class _Rest(NamedTuple):
    """What the second backward pass finds again."""

    numbers: Tensor
    layer: bytes
    x: Tensor
    dy: Tensor
    alive: Parameters  # what ``layer`` points to


class CppBackend(Backend):
    """The backend for CPUs."""

    name = 'cpp'

    def why_not(self, x: Tensor, kernel_size: int) -> str:
        """See :meth:`mmubn.ops.interface.Backend.why_not`."""
        if x.is_cpu and x.dtype in _DTYPES and kernel_size in KERNEL_SIZES:
            if type(x) is not Tensor and type(x) is not nn.Parameter:
                return f'the input is a {type(x).__name__}'
            return _why_no_library(x.dtype, kernel_size)
        if not x.is_cpu:
            return f'the input is on {x.device}, not on the CPU'
        if x.dtype not in _DTYPES:
            return f'it has no kernels for {str(x.dtype).replace("torch.", "")}'
        return no_kernel(kernel_size)

    def forward(
        self, x: Tensor, stride: int, parameters: Parameters, buffers: Buffers, settings: Settings
    ) -> Tuple[Tensor, Optional[Tensor], Tensor]:
        """See :meth:`mmubn.ops.interface.Backend.forward`; one call."""
        if stride > 1:
            return super().forward(x, stride, parameters, buffers, settings)
        return _output('ubn_forward', x, None, parameters, buffers, settings, stride)

    def backward(
        self,
        x: Tensor,
        dy: Tensor,
        image_mean: Optional[Tensor],
        statistics: Tensor,
        parameters: Parameters,
        settings: Settings,
    ) -> Tuple[Tensor, Parameters]:
        """See :meth:`mmubn.ops.interface.Backend.backward`; one call."""
        x, channels_last = _with_format(x)
        dy = _in_layout_of(dy, x)
        parameters = _readable(parameters, statistics.dtype)
        gradients = _gradients(parameters, statistics)
        dx = torch.empty_like(x)
        _call(
            _library(x.dtype, parameters.kernel_size).ubn_backward,
            _layer(x, channels_last, parameters, settings),
            x.data_ptr(),
            dy.data_ptr(),
            _pointer(image_mean),
            settings.needs_image_mean(parameters),
            statistics.data_ptr(),
            *map(_pointer, gradients),
            dx.data_ptr(),
        )
        return dx, gradients

    def measure(
        self, x: Tensor, center_weight: Optional[Tensor], stride: int
    ) -> Tuple[Tensor, Tensor]:
        """See :meth:`mmubn.ops.interface.Backend.measure`."""
        x, channels_last = _with_format(x)
        dtype = statistics_dtype(x.dtype)
        parameters = _readable(Parameters(center_weight=center_weight), dtype)
        batch, channels = x.shape[:2]
        image_mean = x.new_empty((batch, channels), dtype=dtype)
        row = x.new_empty(2 * channels + 3, dtype=dtype)
        _call(
            _any_library(x.dtype).ubn_measure,
            _layer(x, channels_last, parameters, Settings()),
            x.data_ptr(),
            stride == 1,
            image_mean.data_ptr(),
            row.data_ptr(),
        )
        if stride > 1:
            row[1:3] = similarity_of_pairs(x[:, :, ::stride, ::stride], TorchBackend())
        return image_mean, row

    def normalize(
        self,
        x: Tensor,
        image_mean: Optional[Tensor],
        rows: Optional[Tensor],
        parameters: Parameters,
        buffers: Buffers,
        settings: Settings,
    ) -> Tuple[Tensor, Optional[Tensor], Tensor]:
        """See :meth:`mmubn.ops.interface.Backend.normalize`."""
        known = (0, 0) if rows is None else (rows.data_ptr(), len(rows))
        return _output('ubn_normalize', x, image_mean, parameters, buffers, settings, *known)

    def backward_sums(
        self,
        x: Tensor,
        dy: Tensor,
        image_mean: Optional[Tensor],
        statistics: Tensor,
        parameters: Parameters,
        settings: Settings,
    ) -> Sums:
        """See :meth:`mmubn.ops.interface.Backend.backward_sums`."""
        x, channels_last = _with_format(x)
        dy = _in_layout_of(dy, x)
        parameters = _readable(parameters, statistics.dtype)
        gradients = _gradients(parameters._replace(center_weight=None), statistics)
        code = _library(x.dtype, parameters.kernel_size)
        d_statistics = statistics.new_empty((2, x.shape[1]))
        numbers = statistics.new_empty(code.ubn_rest_size(*x.shape[:2]))
        layer = _layer(x, channels_last, parameters, settings)
        _call(
            code.ubn_backward_sums,
            layer,
            x.data_ptr(),
            dy.data_ptr(),
            _pointer(image_mean),
            settings.needs_image_mean(parameters),
            statistics.data_ptr(),
            d_statistics.data_ptr(),
            _pointer(gradients.weight),
            _pointer(gradients.kernel),
            gradients.bias.data_ptr(),
            _pointer(gradients.scale_weight),
            _pointer(gradients.scale_bias),
            numbers.data_ptr(),
        )
        return Sums(d_statistics, gradients, _Rest(numbers, layer, x, dy, parameters))

    def backward_input(
        self,
        x: Tensor,
        statistics: Tensor,
        d_statistics: Tensor,
        parameters: Parameters,
        settings: Settings,
        sums: Sums,
    ) -> Tuple[Tensor, Optional[Tensor]]:
        """See :meth:`mmubn.ops.interface.Backend.backward_input`."""
        numbers, layer, x, dy, parameters_alive = sums.rest
        d_center_weight = to_fill(parameters_alive.center_weight)
        dx = torch.empty_like(x)
        _call(
            _library(x.dtype, parameters.kernel_size).ubn_backward_input,
            layer,
            x.data_ptr(),
            dy.data_ptr(),
            statistics.data_ptr(),
            d_statistics.data_ptr(),
            numbers.data_ptr(),
            dx.data_ptr(),
            _pointer(d_center_weight),
        )
        return dx, d_center_weight

    def squared_sum(self, x: Tensor, weight: Tensor) -> Tensor:
        """See :meth:`mmubn.ops.interface.Backend.squared_sum`."""
        # The sum does not depend on the order of the coordinates: take that of the memory.
        x = dense(x) if x.dim() == 4 else x.contiguous()
        total = ctypes.c_double()
        _call(
            _any_library(x.dtype).ubn_squared_sum,
            x.data_ptr(),
            weight.contiguous().data_ptr(),
            len(x),
            x[0].numel(),
            torch.get_num_threads(),
            ctypes.byref(total),
        )
        return torch.tensor(total.value, dtype=weight.dtype, device=x.device)


def _output(
    function: str,
    x: Tensor,
    image_mean: Optional[Tensor],
    parameters: Parameters,
    buffers: Buffers,
    settings: Settings,
    *known: int,
) -> Tuple[Tensor, Optional[Tensor], Tensor]:
    """Y, m and the statistics, by a function of the library that knows ``known`` of the batch."""
    x, channels_last = _with_format(x)
    dtype = statistics_dtype(x.dtype)
    parameters = _readable(parameters, dtype)
    state = _owned(buffers, dtype)
    batch, channels = x.shape[:2]
    if image_mean is None and settings.needs_image_mean(parameters):
        image_mean = x.new_empty((batch, channels), dtype=dtype)
    y = torch.empty_like(x)
    statistics = x.new_empty(2 * channels + 1, dtype=dtype)
    _call(
        getattr(_library(x.dtype, parameters.kernel_size), function),
        _layer(x, channels_last, parameters, settings),
        _state(state, settings),
        x.data_ptr(),
        _pointer(image_mean),
        *known,
        y.data_ptr(),
        statistics.data_ptr(),
    )
    if settings.update:
        copy_back(buffers, state)
    return y, image_mean, statistics


def _call(function: Callable, *arguments: Any) -> None:
    if function(*arguments):
        raise MemoryError('the C++ of UBN found no memory for a step: use fewer images')


@functools.cache
def _why_no_library(dtype: torch.dtype, kernel_size: int) -> str:
    try:
        _library(dtype, kernel_size)
    except BuildError as error:
        return str(error)
    return ''


# One of each dtype, for what does not depend on k.
_LOADED: Dict[torch.dtype, ctypes.CDLL] = {}


@functools.cache
def _library(dtype: torch.dtype, kernel_size: int) -> ctypes.CDLL:
    code = library(_DTYPES[dtype], kernel_size)
    _declare(code)
    _LOADED.setdefault(dtype, code)
    return code


def _any_library(dtype: torch.dtype) -> ctypes.CDLL:
    return _LOADED.get(dtype) or _library(dtype, 3)


def _declare(code: ctypes.CDLL) -> None:
    layer, state = ctypes.c_char_p, ctypes.c_char_p
    for name, arguments, result in (
        ('forward', [layer, state, *[_POINTER] * 2, _INT, *[_POINTER] * 2], _INT),
        ('backward', [layer, *[_POINTER] * 3, _INT, *[_POINTER] * 8], _INT),
        ('measure', [layer, _POINTER, _INT, *[_POINTER] * 2], _INT),
        ('normalize', [layer, state, *[_POINTER] * 3, _LONG, *[_POINTER] * 2], _INT),
        ('backward_sums', [layer, *[_POINTER] * 3, _INT, *[_POINTER] * 8], _INT),
        ('backward_input', [layer, *[_POINTER] * 7], _INT),
        ('rest_size', [_LONG] * 2, _LONG),
        ('squared_sum', [_POINTER, _POINTER, *[_LONG] * 3, _POINTER], _INT),
    ):
        function = getattr(code, f'ubn_{name}')
        function.argtypes, function.restype = arguments, result


def _layer(x: Tensor, channels_last: bool, parameters: Parameters, settings: Settings) -> bytes:
    weight, kernel, bias, center_weight, scale_weight, scale_bias = parameters
    return _LAYER.pack(
        *x.shape,
        channels_last,
        torch.get_num_threads(),
        settings.scale_from_input,
        settings.eps,
        _pointer(weight),
        _pointer(kernel),
        _pointer(bias),
        _pointer(center_weight),
        _pointer(scale_weight),
        _pointer(scale_bias),
    )


def _state(buffers: Buffers, settings: Settings) -> bytes:
    return _STATE.pack(
        settings.fct is not None,
        settings.update,
        settings.momentum is None,
        settings.warmup,
        settings.momentum or 0.0,
        settings.fct or 0.0,
        settings.similarity_weight,
        _pointer(buffers.running_mean),
        _pointer(buffers.running_var),
        _pointer(buffers.running_similarity),
        _pointer(buffers.num_batches_tracked),
        _pointer(buffers.gate),
    )


def _pointer(value: Optional[Tensor]) -> int:
    return 0 if value is None else value.data_ptr() or refuse_foreign(value)


def _gradients(parameters: Parameters, statistics: Tensor) -> Parameters:
    """To be filled. There is one of the bias, which the backward pass is not given."""
    weight, kernel, _, *rectifiers = map(to_fill, parameters)
    return Parameters(weight, kernel, statistics.new_empty(len(statistics) // 2), *rectifiers)


def _with_dtype(value: Optional[Tensor], dtype: torch.dtype) -> Optional[Tensor]:
    """``value``, converted and in one piece where it is not."""
    return value if value is None else value.to(dtype).contiguous()


def _readable(parameters: Parameters, dtype: torch.dtype) -> Parameters:
    for value in parameters:
        if value is not None and (value.dtype != dtype or not value.is_contiguous()):
            return Parameters(*[_with_dtype(value, dtype) for value in parameters])
    return parameters  # nearly always, and the rest would be felt in a small layer


def _owned(buffers: Buffers, dtype: torch.dtype) -> Buffers:
    """What a step moves, as the library takes it."""
    wanted = Buffers(dtype, dtype, torch.int64, dtype, torch.bool, torch.int64)
    fits = True
    for name, value, kind in zip(Buffers._fields, buffers, wanted):
        if value is None:
            continue
        if not value.is_cpu:
            raise RuntimeError(f'the input is on cpu, {name} on {value.device}')
        fits = fits and value.dtype == kind and value.is_contiguous()
    if fits:
        return buffers
    return Buffers(*map(_with_dtype, buffers, wanted))


def _with_format(x: Tensor) -> Tuple[Tensor, bool]:
    """``x`` in one of the two dense formats, and whether its channels lie side by side."""
    if x.is_contiguous():
        # Of a single pixel both formats are the same, and channels make the better vectors.
        return x, x.shape[2] * x.shape[3] == 1
    if x.is_contiguous(memory_format=torch.channels_last):
        return x, True
    return x.contiguous(), False


def _in_layout_of(dy: Tensor, x: Tensor) -> Tensor:
    """``dy`` in the format and dtype of ``x``."""
    if dy.dtype == x.dtype and dy.stride() == x.stride():
        return dy
    return torch.empty_like(x).copy_(dy)

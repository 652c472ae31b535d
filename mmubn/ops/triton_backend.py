"""A step on a GPU: what is launched over what. Importing it needs no Triton, using it does.

A step of training takes at most five launches forward and four backward:

======== =================================================================================
measure  moments; where the similarity is measured squared_sums; finish_row
(SyncUBN gathers the rows)
output   decide; write_output
sums     where m was not kept moments, else where dY comes in another memory format than X
         a copy of it; sum_pixels; reduce_sums
(SyncUBN adds up d_statistics)
dX       write_input_gradient
======== =================================================================================
"""

import functools
import importlib.util
import os
from types import ModuleType
from typing import Any, NamedTuple, Optional, Tuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .interface import Backend, Buffers, Parameters, Settings, Sums
from .utils import (
    KERNEL_SIZES,
    copy_back,
    in_one_piece,
    is_dense,
    no_kernel,
    refuse_foreign,
    statistics_dtype,
    to_fill,
)

# The oldest that was seen to compile them: they carry tuples through loops.
_TRITON_VERSION = (3, 3)
# Programs that fill a large GPU; where an image and channel block each give fewer, they
# are split further. Those of the convolutions are in Tiles.
_ENOUGH_PROGRAMS = 1024
# Of a grid's second axis, as CUDA has it; long signals as images of one row could reach it.
_MOST_TILES = 65535
# Small numbers that a program reads at once. One for all shapes, as each takes a compilation.
_BLOCK = 1024


class Tiles(NamedTuple):
    """How programs share out the convolutions. ``tools/benchmark_kernels.py`` times others."""

    # Of a row in a program. Each costs 2 k^2 registers in the first backward pass, shared by the
    # threads: more would leave too few threads on the GPU to hide its latency. Halved for k > 3.
    values: int = 256
    warps: int = 4
    channels: int = 64  # at most, where neighbours in memory are channels
    columns: int = 128  # at most, where they are columns
    # At least, times k: the k - 1 that two tiles read must not weigh much.
    rows: int = 8
    programs: int = _ENOUGH_PROGRAMS
    # Rows that memory is asked for before they are needed. They take registers and instructions,
    # and pay where the rows come from DRAM and too few programs are there to wait for it.
    ahead: int = 0
    # Rows for which the loop of the first backward pass is written out. With k of them its sums
    # stay in their registers: at k = 3 a sixth fewer instructions, but a third more registers.
    unroll: int = 1


class _Rest(NamedTuple):
    """What the second backward pass finds again; (N, C) but for dY and the last."""

    dy: Tensor
    image_mean: Optional[Tensor]
    d_shift: Tensor
    d_gap: Optional[Tensor]  # of m through the sigmoid's input
    center_sums: Optional[Tensor]  # (3, C), over n: dh m, m and ((1 + w_m) m - mu) m


class TritonBackend(Backend):
    """The backend for GPUs, and for Triton's interpreter."""

    name = 'triton'
    tiles = Tiles()

    @functools.cached_property
    def _kernels(self) -> ModuleType:
        from . import triton_kernels

        return triton_kernels

    def why_not(self, x: Tensor, kernel_size: int) -> str:
        """See :meth:`mmubn.ops.interface.Backend.why_not`."""
        if importlib.util.find_spec('triton') is None:
            return 'triton is not installed'
        if kernel_size not in KERNEL_SIZES:
            return no_kernel(kernel_size)
        if is_traceable_wrapper_subclass(x):  # a DTensor, which keeps its numbers elsewhere
            return f'the input is a {type(x).__name__}'
        if x.is_cuda:
            return _why_no_launch(x.device)
        if os.environ.get('TRITON_INTERPRET') != '1':
            return f'the input is on {x.device}, not on a GPU'
        return ''

    def measure(
        self, x: Tensor, center_weight: Optional[Tensor], stride: int
    ) -> Tuple[Tensor, Tensor]:
        """See :meth:`mmubn.ops.interface.Backend.measure`."""
        if center_weight is not None:
            center_weight = center_weight.contiguous()
        with torch.cuda.device_of(x):
            moments = self._moments(x, stride if len(x) > 1 else 0)
            partial = None
            if moments.norm is not None:
                partial = self._squared_sums(x, moments.norm, moments.parts, stride)
            return self._finish(x, moments, center_weight, partial)

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
        _, channels, height, width = x.shape
        parameters = _readable(parameters)
        with torch.cuda.device_of(x):
            if image_mean is None and settings.needs_image_mean(parameters):
                moments = self._moments(x, 0)
                image_mean = moments.mean[0]
                if moments.splits > 1:
                    image_mean = self._finish(x, moments, None, None)[0]
            statistics = self._decide(x, rows, buffers, settings)
            y = torch.empty_like(x)
            tiling = _tile(self.tiles, *x.shape, _channels_last(x), parameters.kernel_size)
            self._kernels.write_output[tiling.grid](
                x,
                y,
                image_mean,
                statistics,
                parameters.weight,
                parameters.kernel,
                parameters.bias,
                *_calibration(parameters),
                channels,
                height,
                width,
                tiling.rows,
                *x.stride(),
                *y.stride(),
                settings.scale_from_input,
                *tiling.blocks,
                parameters.kernel_size,
                self.tiles.ahead,
                num_warps=self.tiles.warps,
            )
        return y, image_mean, statistics

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
        batch, channels, height, width = x.shape
        size = parameters.kernel_size
        parameters = in_one_piece(parameters)
        missing = image_mean is None and settings.needs_image_mean(parameters)
        if not missing:  # else planes are small, and the caches do what the copy would
            dy = _with_neighbours_of(dy, x)
        groups, share, tiling = _tile_groups(self.tiles, *x.shape, _channels_last(x), size)
        parts = groups * tiling.grid[1]
        new = statistics.new_empty
        with torch.cuda.device_of(x):
            if missing:  # no reason to split small planes
                image_mean = self._moments(x, 0, may_split=False).mean[0]
            known = (image_mean, statistics, parameters.weight, parameters.kernel)
            known += _calibration(parameters)
            partial = (
                new((tiling.grid[1], batch, channels)),
                new((tiling.grid[1], batch, channels)),
                None if parameters.weight is None else new((parts, channels, size, size)),
                new((parts, channels)),
            )
            self._kernels.sum_pixels[tiling.grid](
                x,
                dy,
                *known,
                *partial,
                batch,
                share,
                channels,
                height,
                width,
                tiling.rows,
                *x.stride(),
                *dy.stride(),
                settings.scale_from_input,
                *tiling.blocks,
                size,
                self.tiles.ahead,
                self.tiles.unroll,
                num_warps=self.tiles.warps,
            )
            weight, calibrated = parameters.weight, parameters.scale_weight is not None
            gradients = Parameters(
                weight=to_fill(weight),
                kernel=to_fill(parameters.kernel),
                bias=new(channels) if weight is None else to_fill(weight),
                scale_weight=to_fill(parameters.scale_weight),
                scale_bias=to_fill(parameters.scale_bias),
            )
            d_statistics = new((2, channels))
            centered = parameters.center_weight is not None
            rest = _Rest(
                dy=dy,
                image_mean=image_mean,
                d_shift=new((batch, channels)),
                d_gap=new((batch, channels)) if calibrated else None,
                center_sums=new((3, channels)) if centered else None,
            )
            block_n, block_c = min(_power(batch), 64), min(_power(channels), 16)
            self._kernels.reduce_sums[(_cdiv(channels, block_c) + channels,)](
                *partial,
                *known,
                d_statistics,
                gradients.weight,
                gradients.kernel,
                gradients.bias,
                gradients.scale_weight,
                gradients.scale_bias,
                rest.d_shift,
                rest.d_gap,
                rest.center_sums,
                batch,
                channels,
                tiling.grid[1],
                parts,
                settings.scale_from_input,
                size,
                _power(size * size),
                _BLOCK // _power(size * size),
                block_n,
                block_c,
                _at_once(tiling.grid[1], block_n * block_c),
                num_warps=8,
            )
        return Sums(d_statistics, gradients, rest)

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
        _, channels, height, width = x.shape
        rest = sums.rest
        parameters = in_one_piece(parameters)
        dx, d_center_weight = torch.empty_like(x), to_fill(parameters.center_weight)
        tiling = _tile(self.tiles, *x.shape, _channels_last(x), parameters.kernel_size)
        with torch.cuda.device_of(x):
            self._kernels.write_input_gradient[tiling.grid](
                x,
                rest.dy,
                dx,
                rest.image_mean,
                statistics,
                d_statistics,
                rest.d_shift,
                rest.d_gap,
                rest.center_sums,
                parameters.weight,
                parameters.kernel,
                *_calibration(parameters),
                d_center_weight,
                channels,
                height,
                width,
                tiling.rows,
                *x.stride(),
                *rest.dy.stride(),
                *dx.stride(),
                settings.scale_from_input,
                *tiling.blocks,
                parameters.kernel_size,
                self.tiles.ahead,
                num_warps=self.tiles.warps,
            )
        return dx, d_center_weight

    def squared_sum(self, x: Tensor, weight: Tensor) -> Tensor:
        """See :meth:`mmubn.ops.interface.Backend.squared_sum`."""
        if x.dim() != 4:
            x = x.flatten(1)[:, :, None, None]
        with torch.cuda.device_of(x):
            return self._squared_sums(x, weight, None, 1).sum()

    def _moments(self, x: Tensor, stride: int, may_split: bool = True) -> '_Moments':
        """Those of the images, and where ``stride`` is not 0 the parts of their squared norms."""
        batch, channels, height, width = x.shape
        pixels = height * width
        share, splits, together, *blocks = _split_pixels(
            batch, channels, pixels, _channels_last(x), may_split
        )
        groups = _cdiv(_cdiv(channels, blocks[0]), together)
        dtype = statistics_dtype(x.dtype)
        mean = x.new_empty((splits, batch, channels), dtype=dtype)
        square = torch.empty_like(mean)
        norm = x.new_empty((batch, groups * splits), dtype=dtype) if stride else None
        stride_n, stride_c, stride_h, stride_w = x.stride()
        if width == 1:  # a size of 1 has any stride
            stride_w = stride_h
        self._kernels.moments[(batch * groups, splits)](
            x,
            mean,
            square,
            norm,
            batch,
            channels,
            width,
            pixels,
            share,
            together,
            stride_n,
            stride_c,
            stride_h,
            stride_w,
            height == 1 or width == 1 or stride_h == width * stride_w,
            stride,
            *blocks,
        )
        return _Moments(mean, square, norm, share)

    def _squared_sums(self, x: Tensor, norm: Tensor, parts: Optional[int], stride: int) -> Tensor:
        """Partial sums of the square of the sum of all images, by their norms' parts; where there
        are none, ``norm`` is what each is multiplied by.
        """
        batch, channels, height, width = x.shape
        height, width = _cdiv(height, stride), _cdiv(width, stride)
        size = channels * height * width
        flat = stride == 1 and is_dense(x)
        # Values at once; those that are not one after the other cost an address each.
        values = 4096 if flat else 1024
        block = min(max(_power(_cdiv(size, _ENOUGH_PROGRAMS)), 128), values // 4)
        block_n = min(_power(batch), values // block)
        programs = min(_cdiv(size, block), 2 * _ENOUGH_PROGRAMS)
        partial = norm.new_empty(programs)
        stride_n, stride_c, stride_h, stride_w = x.stride()
        self._kernels.squared_sums[(programs,)](
            x,
            norm,
            partial,
            batch,
            parts or 1,
            size,
            channels,
            height,
            width,
            stride_n,
            stride_c,
            stride_h * stride,
            stride_w * stride,
            flat,
            _channels_last(x),
            parts is None,
            batch <= block_n,
            block_n,
            block,
            _BLOCK // block_n,
        )
        return partial

    def _finish(
        self,
        x: Tensor,
        moments: '_Moments',
        center_weight: Optional[Tensor],
        partial: Optional[Tensor],
    ) -> Tuple[Tensor, Tensor]:
        """The image means m and the row."""
        batch, channels, height, width = x.shape
        mean = moments.mean
        row = mean.new_empty(2 * channels + 3)
        image_mean = None if moments.splits == 1 else torch.empty_like(mean[0])
        block_n, block_c = min(_power(batch), 128), min(_power(channels), 16)
        measured = partial is not None
        parts, partials = (moments.parts, len(partial)) if measured else (1, 1)
        splits = moments.splits
        self._kernels.finish_row[(_cdiv(channels, block_c) + measured,)](
            mean,
            moments.square,
            image_mean,
            center_weight,
            moments.norm,
            partial,
            row,
            batch,
            channels,
            height * width,
            moments.share,
            splits,
            batch * height * width,
            batch * (batch - 1),
            parts,
            partials,
            block_n,
            block_c,
            _at_once(splits, block_n * block_c),
            _BLOCK // block_n,
            _BLOCK,
            num_warps=8,
        )
        return mean[0] if image_mean is None else image_mean, row

    def _decide(
        self, x: Tensor, rows: Optional[Tensor], buffers: Buffers, settings: Settings
    ) -> Tensor:
        """The statistics that normalise; moves the buffers."""
        channels = x.shape[1]
        statistics = x.new_empty(2 * channels + 1, dtype=statistics_dtype(x.dtype))
        momentum, fct = settings.momentum, settings.fct
        moved = _readable(buffers)
        self._kernels.decide[(1,)](
            rows,
            statistics,
            moved.running_mean,
            moved.running_var,
            moved.num_batches_tracked,
            moved.running_similarity,
            moved.gate,
            channels,
            settings.warmup,
            float(settings.eps),
            0.0 if momentum is None else float(momentum),
            0.0 if fct is None else float(fct),
            float(settings.similarity_weight),
            1 if rows is None else len(rows),
            settings.training and fct is not None,
            settings.training and settings.update and buffers.running_mean is not None,
            momentum is None,
            _BLOCK,
        )
        copy_back(buffers, moved)
        return statistics


class _Moments(NamedTuple):
    """What is known of the images before their shares of pixels are put together."""

    mean: Tensor  # (splits, N, C)
    square: Tensor  # (splits, N, C), of the differences to it
    norm: Optional[Tensor]  # (N, parts)
    share: int  # pixels of every split but the last

    @property
    def splits(self) -> int:
        return self.mean.shape[0]

    @property
    def parts(self) -> int:
        return self.norm.shape[1]


class _Tiling(NamedTuple):
    """How programs share out images: blocks of channels, tiles of rows and columns, images."""

    grid: Tuple[int, int]  # images (or groups of them) x channel blocks, tiles
    rows: int  # of a tile
    blocks: Tuple[int, int]  # channels and columns of a program


@functools.cache
def _tile(
    tiles: Tiles,
    images: int,
    channels: int,
    height: int,
    width: int,
    channels_last: bool,
    kernel_size: int,
) -> _Tiling:
    values = tiles.values if kernel_size <= 3 else tiles.values // 2
    if channels_last:
        block_c = min(_power(channels), tiles.channels)
        while width * block_c > _MOST_TILES * values:
            block_c //= 2
        block_w = min(_power(width), values // block_c)
    else:
        block_w = min(_power(width), tiles.columns)
        block_c = min(_power(channels), values // block_w)
    blocks_c, blocks_w = _cdiv(channels, block_c), _cdiv(width, block_w)
    wanted = _cdiv(tiles.programs, blocks_c * blocks_w * images)
    rows = max(_cdiv(height, wanted), min(height, tiles.rows * kernel_size))
    return _Tiling((images * blocks_c, _cdiv(height, rows) * blocks_w), rows, (block_c, block_w))


@functools.cache
def _tile_groups(tiles: Tiles, batch: int, *plane: Any) -> Tuple[int, int, _Tiling]:
    """Groups of images, images of each, tiling: a program of the sums takes one after the other."""
    groups = min(batch, _cdiv(tiles.programs, _tile(tiles, 1, *plane).grid[0]))
    share = _cdiv(batch, groups)
    groups = _cdiv(batch, share)
    return groups, share, _tile(tiles, groups, *plane)


@functools.cache
def _split_pixels(
    batch: int, channels: int, pixels: int, channels_last: bool, may_split: bool
) -> Tuple[int, int, int, int, int]:
    """Pixels of a split, splits, channel blocks of a program, channels and pixels at once."""
    block_c = min(_power(channels), 64) if channels_last else 1
    block_p = min(_power(pixels), 1024 // block_c)
    block_c = min(_power(channels), 1024 // block_p)
    blocks_p = _cdiv(pixels, block_p)
    programs = batch * _cdiv(channels, block_c)
    splits = min(blocks_p, _cdiv(_ENOUGH_PROGRAMS, programs)) if may_split else 1
    share = _cdiv(blocks_p, splits) * block_p
    together = min(max(programs // _ENOUGH_PROGRAMS, 1), _cdiv(channels, block_c))
    return share, _cdiv(pixels, share), together, block_c, block_p


def _calibration(parameters: Parameters) -> Tuple[Optional[Tensor], ...]:
    return parameters.center_weight, parameters.scale_weight, parameters.scale_bias


def _channels_last(x: Tensor) -> bool:
    """Whether neighbours in memory are channels."""
    return x.stride(1) == 1 and x.shape[1] > 1


def _readable(values: Any) -> Any:
    """As :func:`.utils.in_one_piece`; refuses what a kernel would take for None."""
    for value in values:
        if value is not None and not value.data_ptr():
            refuse_foreign(value)
    return in_one_piece(values)


def _with_neighbours_of(dy: Tensor, x: Tensor) -> Tensor:
    """``dy``, as a copy where its neighbours in memory are not those of ``x``.

    The kernels take any strides; these would cost more than the copy.
    """
    fastest = 1 if _channels_last(x) else 3
    if dy.stride(fastest) <= 1 or dy.shape[fastest] == 1:
        return dy
    return torch.empty_like(x, dtype=dy.dtype).copy_(dy)


def _at_once(parts: int, size: int) -> int:
    """How many parts of some size a program adds up at once; two values of it to compile for."""
    return 1 if parts == 1 else max(_BLOCK // size, 1)


def _cdiv(number: int, divisor: int) -> int:
    return -(-number // divisor)


def _power(size: int) -> int:
    """The next power of two."""
    return 1 << (size - 1).bit_length()


@functools.cache
def _why_no_launch(device: torch.device) -> str:
    import triton

    if tuple(map(int, triton.__version__.split('.')[:2])) < _TRITON_VERSION:
        needed = '.'.join(map(str, _TRITON_VERSION))
        return f'its kernels need triton {needed}, found {triton.__version__}'
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f'{device} is older than compute capability 8.0'
    try:  # loads its link to the driver, for which it wants a C compiler and Python.h
        triton.runtime.driver.active.get_current_device()
    except Exception as error:  # whatever a compiler, a loader or the driver raises
        return f'triton cannot start: {error}'
    return ''

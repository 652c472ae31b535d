r"""The passes over the large tensors as Triton kernels; the functions of :mod:`passes_torch`.

Bytes, in passes over X: moments 1 read, similarity 1 read, forward 1 read and 1 write,
first backward pass 2 reads (X, dY), second 2 reads and 1 write. Nothing of X's size is
kept but X.

The convolutions march down the rows of an image. Each row is read k times, once a column
shift, and added to the k output rows that it touches, of which k - 1 are carried in
registers; k^2 loads an output, the obvious way, would be bound by the first level cache
in half precision.

Every kernel takes both dense memory formats by strides, adds up in a fixed order (no
atomics: the same input gives the same bits), works in float32 (float64 for float64) and
addresses images and rows with 64 bits. No function waits for the device or asks it
anything, so all of them can be captured in a CUDA graph.

Symbols as in :mod:`mmubn.ops.ubn`; p is k // 2.
"""

from typing import NamedTuple, Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .torch_backend import PassSums
from .utils import statistics_dtype

# Programs that fill a large GPU; where an image and channel block each give fewer, they
# are split further.
_ENOUGH_PROGRAMS = 1024


def image_mean(x: Tensor) -> Tensor:
    """Mean over H and W, (N, C)."""
    return image_moments(x)[0]


def image_moments(x: Tensor) -> Tuple[Tensor, Tensor]:
    """Mean and biased variance over H and W, two of (N, C)."""
    x = _dense(x)
    batch, channels, height, width = x.shape
    pixels = height * width
    block_c = min(_power(channels), 64) if x.stride(1) == 1 else 1
    block_p = min(_power(pixels), 2048 // block_c)
    block_c = min(_power(channels), 2048 // block_p)
    blocks_c = triton.cdiv(channels, block_c)
    blocks_p = triton.cdiv(pixels, block_p)
    splits = min(blocks_p, triton.cdiv(_ENOUGH_PROGRAMS, batch * blocks_c))
    share = triton.cdiv(blocks_p, splits) * block_p  # pixels of every split but the last
    splits = triton.cdiv(pixels, share)
    mean = x.new_empty((splits, batch, channels), dtype=statistics_dtype(x.dtype))
    square = torch.empty_like(mean)  # sum of squares about that mean
    with torch.cuda.device_of(x):
        _moments[(blocks_c * batch, splits)](
            x,
            mean,
            square,
            batch,
            channels,
            pixels,
            share,
            x.stride(0),
            x.stride(1),
            x.stride(3) if width > 1 else x.stride(2),  # a size of 1 has any stride
            block_c,
            block_p,
        )
    if splits == 1:
        return mean[0], square[0].div_(pixels)
    last = pixels - (splits - 1) * share
    total = (mean[:-1].sum(0) * share + mean[-1] * last) / pixels
    between = (mean - total).square()
    within = square.sum(0) + between[:-1].sum(0) * share + between[-1] * last
    return total, within / pixels


def squared_sum(x: Tensor, weight: Tensor) -> Tensor:
    """``|| sum_n weight_n X_n ||^2``, a scalar, with weight (N,)."""
    x = _dense(x) if x.dim() == 4 else x.contiguous()
    batch = x.shape[0]
    size = x[0].numel()
    block = 256 if size > 256 * _ENOUGH_PROGRAMS else 128
    partial = weight.new_empty(triton.cdiv(size, block))
    with torch.cuda.device_of(x):
        _squared_sum[partial.shape](x, weight, partial, batch, size, x.stride(0), 8, block)
    return partial.sum()


def forward(
    x: Tensor, shift: Tensor, scale: Tensor, taps: Tensor, bias: Optional[Tensor]
) -> Tensor:
    """``Y = dwconv(a (X + h); K) + beta``, in the dtype and memory format of X."""
    x = _dense(x)
    tiling = _tile(x, taps.shape[-1], x.shape[0])
    y = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _forward[tiling.grid](
            x,
            y,
            shift.contiguous(),
            scale.contiguous(),
            taps.contiguous(),
            taps if bias is None else bias,
            bias is not None,
            *x.shape[1:],
            *x.stride(),
            *tiling.blocks,
            taps.shape[-1],
        )
    return y


def backward_sums(x: Tensor, dy: Tensor, shift: Tensor, scale: Tensor, taps: Tensor) -> PassSums:
    """First backward pass: everything that is a sum over X's pixels. Keeps no dX_r."""
    x = _dense(x)
    dy = _like(dy, x)
    batch, channels = shift.shape
    size = taps.shape[-1]
    tiling = _tile(x, size, 1)
    groups = min(batch, triton.cdiv(_ENOUGH_PROGRAMS, tiling.grid[0]))
    share = triton.cdiv(batch, groups)  # images of a program, one after the other
    groups = triton.cdiv(batch, share)
    tiling = _tile(x, size, groups)
    tiles = tiling.grid[1]
    d_scale = shift.new_empty((tiles, batch, channels))
    d_shift = torch.empty_like(d_scale)
    d_taps = shift.new_empty((groups, tiles, channels, size, size))
    d_bias = shift.new_empty((groups, tiles, channels))
    with torch.cuda.device_of(x):
        _backward_sums[tiling.grid](
            x,
            dy,
            shift.contiguous(),
            scale.contiguous(),
            taps.contiguous(),
            d_scale,
            d_shift,
            d_taps,
            d_bias,
            batch,
            share,
            *x.shape[1:],
            *x.stride(),
            *tiling.blocks,
            size,
        )
    return PassSums(
        _add_up(d_scale), _add_up(d_shift), d_taps.sum((0, 1)), d_bias.sum((0, 1)), d_x_r=None
    )


def backward_input(
    x: Tensor,
    dy: Tensor,
    image_mean: Tensor,
    scale: Tensor,
    slope: Tensor,
    level: Tensor,
    taps: Tensor,
    d_x_r: None,
) -> Tensor:
    """Second backward pass: ``dX = a dX_r + slope (X - m) + level``, dX_r made anew from dY."""
    x = _dense(x)
    dy = _like(dy, x)
    tiling = _tile(x, taps.shape[-1], x.shape[0])
    dx = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _backward_input[tiling.grid](
            x,
            dy,
            dx,
            image_mean,
            scale.contiguous(),
            slope.contiguous(),
            level.contiguous(),
            taps.contiguous(),
            *x.shape[1:],
            *x.stride(),
            *tiling.blocks,
            taps.shape[-1],
        )
    return dx


class _Tiling(NamedTuple):
    """How programs share out images: blocks of channels, tiles of rows and columns, images."""

    grid: Tuple[int, int]  # images (or groups of them) x channel blocks, tiles
    blocks: Tuple[int, int, int]  # rows, channels and columns of a program


def _tile(x: Tensor, kernel_size: int, images: int) -> _Tiling:
    _, channels, height, width = x.shape
    # Values of a row in a program of 128 threads. Each costs k^2 registers in the first
    # backward pass: more would leave too few threads on the GPU to hide its latency.
    values = 256 if kernel_size <= 3 else 128
    if x.stride(1) == 1:
        block_c = min(_power(channels), 64)
        block_w = min(_power(width), values // block_c)
    else:
        block_w = min(_power(width), 128)
        block_c = min(_power(channels), values // block_w)
    blocks_c, blocks_w = triton.cdiv(channels, block_c), triton.cdiv(width, block_w)
    # Rows read twice, kernel_size - 1 a tile, must not weigh much.
    wanted = triton.cdiv(_ENOUGH_PROGRAMS, blocks_c * blocks_w * images)
    rows = max(triton.cdiv(height, wanted), min(height, 8 * kernel_size))
    tiles = triton.cdiv(height, rows) * blocks_w
    return _Tiling((images * blocks_c, tiles), (rows, block_c, block_w))


def _dense(x: Tensor) -> Tensor:
    """``x`` in one of the two dense memory formats."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


def _like(dy: Tensor, x: Tensor) -> Tensor:
    """``dy`` with the strides of ``x``."""
    return dy if dy.stride() == x.stride() else torch.empty_like(x, dtype=dy.dtype).copy_(dy)


def _power(size: int) -> int:
    return triton.next_power_of_2(size)


def _add_up(parts: Tensor) -> Tensor:
    return parts[0] if len(parts) == 1 else parts.sum(0)


@triton.jit
def _moments(
    x_ptr,
    mean_ptr,
    square_ptr,
    batch,
    channels,
    pixels,
    share,
    stride_n,
    stride_c,
    stride_p,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Mean of one share of the pixels, and the sum of squares about it, by Chan's update."""
    blocks_c = tl.cdiv(channels, BLOCK_C)
    n, split = tl.program_id(0) // blocks_c, tl.program_id(1)
    c = (tl.program_id(0) % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    start = split * share
    end = tl.minimum(start + share, pixels)
    image = x_ptr + n.to(tl.int64) * stride_n + c[:, None].to(tl.int64) * stride_c
    mean = tl.zeros([BLOCK_C], mean_ptr.dtype.element_ty)
    square = tl.zeros([BLOCK_C], mean_ptr.dtype.element_ty)
    for first in range(start, end, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        mask = (c[:, None] < channels) & (p[None, :] < end)
        x = tl.load(image + p[None, :].to(tl.int64) * stride_p, mask=mask, other=0.0)
        x = x.to(mean.dtype)
        before = first - start
        here = tl.minimum(end - first, BLOCK_P)
        weight = here.to(mean.dtype) / (before + here)
        here_mean = tl.sum(x, 1) / here
        centred = tl.where(mask, x - here_mean[:, None], 0.0)
        step = here_mean - mean
        mean += step * weight
        square += tl.sum(centred * centred, 1) + step * step * (before * weight)
    out = (split * batch + n).to(tl.int64) * channels + c
    tl.store(mean_ptr + out, mean, mask=c < channels)
    tl.store(square_ptr + out, square, mask=c < channels)


@triton.jit
def _squared_sum(
    x_ptr,
    weight_ptr,
    partial_ptr,
    batch,
    size,
    stride_n,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum over one block of coordinates of the square of the weighted sum over the batch."""
    d = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK_N, BLOCK], weight_ptr.dtype.element_ty)
    for first in range(0, batch, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        weight = tl.load(weight_ptr + n, mask=n < batch, other=0.0)
        row = x_ptr + n[:, None].to(tl.int64) * stride_n
        mask = (n[:, None] < batch) & (d[None, :] < size)
        total += tl.load(row + d[None, :], mask=mask, other=0.0).to(total.dtype) * weight[:, None]
    sums = tl.sum(total, 0)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(sums * sums, 0))


@triton.jit
def _program(channels, width, rows, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr):
    """Image (or group of them), channels, columns and first row of this program.

    The first and the last of 64 bits, as what is multiplied with strides must be.
    """
    blocks_c, blocks_w = tl.cdiv(channels, BLOCK_C), tl.cdiv(width, BLOCK_W)
    n = (tl.program_id(0) // blocks_c).to(tl.int64)
    c = (tl.program_id(0) % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    w = (tl.program_id(1) % blocks_w) * BLOCK_W + tl.arange(0, BLOCK_W)
    return n, c, w, (tl.program_id(1) // blocks_w).to(tl.int64) * rows


@triton.jit
def _load_taps(taps_ptr, c, channels, DTYPE: tl.constexpr, K: tl.constexpr, REVERSE: tl.constexpr):
    """The k^2 taps of (BLOCK_C, 1) each, row by row; REVERSE begins with the last."""
    taps = ()
    for index in tl.static_range(K * K):
        place = K * K - 1 - index if REVERSE else index
        tap = tl.load(taps_ptr + c * (K * K) + place, mask=c < channels, other=0.0)
        taps = taps + (tap.to(DTYPE)[:, None],)
    return taps


@triton.jit
def _convolve_row(
    row_ptr,
    inside,
    w,
    width,
    stride_w,
    taps,
    shift,
    scale,
    RECTIFY: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_W: tl.constexpr,
    K: tl.constexpr,
):
    """What a row adds to the k rows of the output that it touches, the lowest first.

    ``inside`` masks channels and row; RECTIFY makes X_r of X.
    """
    new = (tl.zeros([BLOCK_C, BLOCK_W], scale.dtype),) * K
    for j in tl.static_range(K):
        column = w[None, :] + (j - K // 2)
        mask = inside & (column >= 0) & (column < width)
        x = tl.load(row_ptr + column * stride_w, mask=mask, other=0.0).to(scale.dtype)
        if RECTIFY:
            x = tl.where(mask, (x + shift) * scale, 0.0)
        added = ()
        for i in tl.static_range(K):
            added = added + (new[i] + taps[i * K + j] * x,)
        new = added
    return new


@triton.jit
def _finish_row(carried, new, K: tl.constexpr):
    """Adds the k contributions of a row; returns the row that has all, and the carried rest."""
    if K == 1:
        done, rest = new[0], carried
    else:
        done, rest = carried[K - 2] + new[K - 1], (new[0],)
        for i in tl.static_range(1, K - 1):
            rest = rest + (carried[i - 1] + new[i],)
    return done, rest


@triton.jit
def _forward(
    x_ptr,
    y_ptr,
    shift_ptr,
    scale_ptr,
    taps_ptr,
    bias_ptr,
    HAS_BIAS: tl.constexpr,
    channels,
    height,
    width,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    rows,
    BLOCK_C: tl.constexpr,
    BLOCK_W: tl.constexpr,
    K: tl.constexpr,
):
    n, c, w, first = _program(channels, width, rows, BLOCK_C, BLOCK_W)
    shift = tl.load(shift_ptr + n * channels + c, mask=c < channels, other=0.0)[:, None]
    scale = tl.load(scale_ptr + n * channels + c, mask=c < channels, other=0.0)[:, None]
    taps = _load_taps(taps_ptr, c, channels, scale.dtype, K, REVERSE=False)
    bias = tl.zeros([BLOCK_C, 1], scale.dtype)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + c, mask=c < channels, other=0.0).to(scale.dtype)[:, None]
    image = n * stride_n + c[:, None].to(tl.int64) * stride_c
    carried = (tl.zeros([BLOCK_C, BLOCK_W], scale.dtype),) * (K - 1)
    last = tl.minimum(first + rows, height)
    for step in range(last - first + 2 * (K // 2)):
        q = first - K // 2 + step
        row_ptr = x_ptr + image + q * stride_h
        inside = (c[:, None] < channels) & (q >= 0) & (q < height)
        new = _convolve_row(
            row_ptr, inside, w, width, stride_w, taps, shift, scale, True, BLOCK_C, BLOCK_W, K
        )
        y, carried = _finish_row(carried, new, K)
        h = q - K // 2
        mask = (c[:, None] < channels) & (w[None, :] < width) & (h >= first)
        place = image + h * stride_h + w[None, :] * stride_w
        tl.store(y_ptr + place, (y + bias).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_input(
    x_ptr,
    dy_ptr,
    dx_ptr,
    mean_ptr,
    scale_ptr,
    slope_ptr,
    level_ptr,
    taps_ptr,
    channels,
    height,
    width,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    rows,
    BLOCK_C: tl.constexpr,
    BLOCK_W: tl.constexpr,
    K: tl.constexpr,
):
    n, c, w, first = _program(channels, width, rows, BLOCK_C, BLOCK_W)
    at = n * channels + c
    mean = tl.load(mean_ptr + at, mask=c < channels, other=0.0)[:, None]
    scale = tl.load(scale_ptr + at, mask=c < channels, other=0.0)[:, None]
    slope = tl.load(slope_ptr + at, mask=c < channels, other=0.0)[:, None]
    level = tl.load(level_ptr + at, mask=c < channels, other=0.0)[:, None]
    # dX_r[h, w] sums K[i, j] dY[h - i + p, w - j + p]: the forward with K reversed.
    taps = _load_taps(taps_ptr, c, channels, scale.dtype, K, REVERSE=True)
    image = n * stride_n + c[:, None].to(tl.int64) * stride_c
    carried = (tl.zeros([BLOCK_C, BLOCK_W], scale.dtype),) * (K - 1)
    last = tl.minimum(first + rows, height)
    for step in range(last - first + 2 * (K // 2)):
        q = first - K // 2 + step
        row_ptr = dy_ptr + image + q * stride_h
        inside = (c[:, None] < channels) & (q >= 0) & (q < height)
        new = _convolve_row(
            row_ptr, inside, w, width, stride_w, taps, scale, scale, False, BLOCK_C, BLOCK_W, K
        )
        d_x_r, carried = _finish_row(carried, new, K)
        h = q - K // 2
        mask = (c[:, None] < channels) & (w[None, :] < width) & (h >= first)
        place = image + h * stride_h + w[None, :] * stride_w
        x = tl.load(x_ptr + place, mask=mask, other=0.0).to(scale.dtype)
        dx = scale * d_x_r + (slope * (x - mean) + level)
        tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_sums(
    x_ptr,
    dy_ptr,
    shift_ptr,
    scale_ptr,
    taps_ptr,
    d_scale_ptr,
    d_shift_ptr,
    d_taps_ptr,
    d_bias_ptr,
    batch,
    share,
    channels,
    height,
    width,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    rows,
    BLOCK_C: tl.constexpr,
    BLOCK_W: tl.constexpr,
    K: tl.constexpr,
):
    """A program's pixels of X meet all dY within p of them, image after image of its share."""
    group, c, w, first = _program(channels, width, rows, BLOCK_C, BLOCK_W)
    tile = tl.program_id(1).to(tl.int64)
    last = tl.minimum(first + rows, height)
    known = c[:, None] < channels
    DTYPE: tl.constexpr = d_scale_ptr.dtype.element_ty
    zero = tl.zeros([BLOCK_C, BLOCK_W], DTYPE)
    taps = _load_taps(taps_ptr, c, channels, DTYPE, K, REVERSE=False)
    d_taps = (zero,) * (K * K)
    d_bias = zero
    for i in range(tl.minimum(share, batch - group * share)):
        n = group * share + i
        shift = tl.load(shift_ptr + n * channels + c, mask=c < channels, other=0.0)[:, None]
        scale = tl.load(scale_ptr + n * channels + c, mask=c < channels, other=0.0)[:, None]
        image = n * stride_n + c[:, None].to(tl.int64) * stride_c
        d_scale = zero
        d_x_r_sum = zero
        shifted = (zero,) * K  # X + h of the rows q - p, ..., q + p, zero outside of the tile
        for step in range(last - first + 2 * (K // 2)):
            q = first - K // 2 + step
            h = q + K // 2
            mask = known & (w[None, :] < width) & (h >= first) & (h < last)
            place = image + h * stride_h + w[None, :] * stride_w
            x = tl.load(x_ptr + place, mask=mask, other=0.0).to(DTYPE)
            newest = (tl.where(mask, x + shift, 0.0),)
            shifted = shifted[1:] + newest
            row = image + q * stride_h
            for j in tl.static_range(K):
                column = w[None, :] + (K // 2 - j)
                inside = (column >= 0) & (column < width) & (q >= 0) & (q < height)
                # Columns of X outside of the image belong to no program.
                inside = inside & known & (w[None, :] < width)
                dy = tl.load(dy_ptr + row + column * stride_w, mask=inside, other=0.0).to(DTYPE)
                if j == K // 2:
                    d_bias += tl.where((q >= first) & (q < last), dy, 0.0)
                scaled = dy * scale
                added = ()
                for index in tl.static_range(K * K):
                    if index % K == j:
                        added = added + (d_taps[index] + shifted[index // K] * scaled,)
                        h = q + index // K - K // 2
                        d_x_r = taps[index] * dy
                        d_scale += shifted[index // K] * d_x_r
                        d_x_r_sum += tl.where((h >= first) & (h < last), d_x_r, 0.0)
                    else:
                        added = added + (d_taps[index],)
                d_taps = added
        out = (tile * batch + n) * channels + c
        tl.store(d_scale_ptr + out, tl.sum(d_scale, 1), mask=c < channels)
        d_shift = tl.sum(d_x_r_sum * scale, 1)
        tl.store(d_shift_ptr + out, d_shift, mask=c < channels)
    part = (group * tl.num_programs(1) + tile) * channels + c
    tl.store(d_bias_ptr + part, tl.sum(d_bias, 1), mask=c < channels)
    for index in tl.static_range(K * K):
        tl.store(d_taps_ptr + part * (K * K) + index, tl.sum(d_taps[index], 1), mask=c < channels)

r"""The Triton kernels of a step; :mod:`mmubn.ops.triton_backend` launches them.

Bytes, in passes over X: :func:`moments` 1 read, :func:`squared_sums` 1 read, :func:`write_output`
1 read and 1 write, :func:`sum_pixels` 2 reads (X, dY), :func:`write_input_gradient` 2 reads and
1 write. The other three read and write numbers a channel, or an image and channel. What a program
needs of the coefficients of Eqs. 4 and 5 it works out itself (:func:`_coefficients`).

The convolutions march down the rows of an image. Each row is read k times, once a column
shift, and added to the k output rows that it touches, of which k - 1 are carried in
registers; k^2 loads an output, the obvious way, would be bound by the first level cache
in half precision.

Every kernel takes tensors of any strides, adds up in a fixed order (no atomics: the same input
gives the same bits), works in float32 (float64 for float64), converts parameters and buffers of
another dtype, and addresses images and rows with 64 bits. None reads what another program of
the same launch writes.

Symbols as in :mod:`mmubn.ops.interface`; p is k // 2. A pointer may be None where a switch is
off. Numbers of Python that a kernel takes are annotated as float64, or float32 would round them.
Counts of which no address is made are not specialized: Triton would compile a kernel anew where one
is 1 or divisible by 16.
"""

import triton
import triton.language as tl


@triton.jit
def _load(ptr, mask, DTYPE: tl.constexpr):
    return tl.load(ptr, mask=mask, other=0.0).to(DTYPE)


@triton.jit
def _is_finite(value):
    return tl.abs(value) < float('inf')


@triton.jit
def _lerp(start, end, weight):
    """As torch's: exact at both ends."""
    near_start = start + weight * (end - start)
    return tl.where(weight < 0.5, near_start, end - (end - start) * (1 - weight))


@triton.jit
def _coefficients(
    n,
    c,
    mask,
    channels,
    image_mean_ptr,
    statistics_ptr,
    center_weight_ptr,
    scale_weight_ptr,
    scale_bias_ptr,
    SCALE_FROM_INPUT: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """m, h, what the sigmoid sees, g and r, for images ``n`` and channels ``c``."""
    mean = _load(statistics_ptr + c, mask, DTYPE)
    rstd = _load(statistics_ptr + channels + c, mask, DTYPE)
    image_mean = tl.zeros_like(mean)
    if image_mean_ptr is not None:
        image_mean = _load(image_mean_ptr + n * channels + c, mask, DTYPE)
    shift = -mean
    if center_weight_ptr is not None:
        shift += _load(center_weight_ptr + c, mask, DTYPE) * image_mean
    pooled = image_mean
    if not SCALE_FROM_INPUT:
        pooled = (image_mean + shift) * rstd
    factor = tl.full(mean.shape, 1.0, DTYPE)
    if scale_weight_ptr is not None:
        weight = _load(scale_weight_ptr + c, mask, DTYPE)
        factor = tl.sigmoid(weight * pooled + _load(scale_bias_ptr + c, mask, DTYPE))
    return image_mean, shift, pooled, factor, rstd


@triton.jit(do_not_specialize=['batch'])
def moments(
    x_ptr,
    mean_ptr,
    square_ptr,
    norm_ptr,
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
    FLAT: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Mean of one share of the pixels, and the sum of squares about it.

    Each place of the tile follows its own, by Welford's update; Chan's puts them together at the
    end, so the loop has no sum over threads.

    A program takes ``together`` blocks of channels of an image. It also writes their part of
    the image's squared norm over every STRIDE-th row and column. FLAT is one stride for all
    pixels.
    """
    DTYPE: tl.constexpr = mean_ptr.dtype.element_ty
    blocks_c = tl.cdiv(channels, BLOCK_C)
    groups = tl.cdiv(blocks_c, together)
    n, group, split = tl.program_id(0) // groups, tl.program_id(0) % groups, tl.program_id(1)
    start = split * share
    end = tl.minimum(start + share, pixels)
    norm = tl.zeros([BLOCK_C], DTYPE)
    for block in range(group * together, tl.minimum((group + 1) * together, blocks_c)):
        c = block * BLOCK_C + tl.arange(0, BLOCK_C)
        image = x_ptr + n.to(tl.int64) * stride_n + c[:, None].to(tl.int64) * stride_c
        means = tl.zeros([BLOCK_C, BLOCK_P], DTYPE)
        squares = tl.zeros([BLOCK_C, BLOCK_P], DTYPE)
        norms = tl.zeros([BLOCK_C, BLOCK_P], DTYPE)
        for first in range(start, end, BLOCK_P):
            p = first + tl.arange(0, BLOCK_P)
            mask = (c[:, None] < channels) & (p[None, :] < end)
            place = p.to(tl.int64) * stride_w
            if not FLAT:
                place = (p // width).to(tl.int64) * stride_h + (p % width).to(tl.int64) * stride_w
            x = _load(image + place[None, :], mask, DTYPE)
            step = tl.where(mask, x - means, 0.0)
            means += step * (1.0 / ((first - start) // BLOCK_P + 1).to(DTYPE))
            squares += step * (x - means)
            if STRIDE > 1:
                sampled = (p // width % STRIDE == 0) & (p % width % STRIDE == 0)
                norms += tl.where(sampled[None, :], x * x, 0.0)
        total = end - start
        counts = tl.maximum((total - tl.arange(0, BLOCK_P) + BLOCK_P - 1) // BLOCK_P, 0)[None, :]
        weights = counts.to(DTYPE) / total
        mean = tl.sum(means * weights, 1)
        mean += tl.sum((means - mean[:, None]) * weights, 1)  # what the first sum rounded off
        step = means - mean[:, None]
        # In this order: the square may overflow where the count is 0.
        square = tl.sum(squares + step * (step * counts), 1)
        norm += tl.sum(norms, 1)
        out = (split * batch + n).to(tl.int64) * channels + c
        tl.store(mean_ptr + out, mean, mask=c < channels)
        tl.store(square_ptr + out, square, mask=c < channels)
        if STRIDE == 1:
            norm += square + mean * mean * total
    if norm_ptr is not None:
        part = tl.program_id(0) * tl.num_programs(1) + split
        tl.store(norm_ptr + part, tl.sum(norm, 0))


@triton.jit
def _squared_norms(norm_ptr, n, batch, parts, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """``|| X_n ||^2`` of a block of images, from its parts."""
    norm = tl.zeros([n.shape[0], BLOCK], DTYPE)
    for first in range(0, parts, BLOCK):
        part = first + tl.arange(0, BLOCK)
        mask = (n[:, None] < batch) & (part[None, :] < parts)
        norm += _load(norm_ptr + n[:, None] * parts + part[None, :], mask, DTYPE)
    return tl.sum(norm, 1)


@triton.jit
def _image_weights(
    norm_ptr, n, batch, parts, ARE_WEIGHTS: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr
):
    """``1 / || X_n ||``, 0 for a zero image; or what is given."""
    if ARE_WEIGHTS:
        weight = _load(norm_ptr + n, n < batch, DTYPE)
    else:
        norm = _squared_norms(norm_ptr, n, batch, parts, DTYPE, BLOCK)
        # The rsqrt of a GPU takes a denormal for 0.
        is_small = norm < 1e-30
        norm = tl.where(is_small, norm * 2.0**60, norm)
        root = tl.rsqrt(tl.where(norm > 0, norm, 1.0))
        weight = tl.where(norm > 0, tl.where(is_small, root * 2.0**30, root), 0.0)
    return weight


@triton.jit(do_not_specialize=['batch', 'height'])
def squared_sums(
    x_ptr,
    norm_ptr,
    partial_ptr,
    batch,
    parts,
    size,
    channels,
    height,
    width,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    FLAT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ARE_WEIGHTS: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """Sum over coordinates of the square of the weighted sum over the batch.

    FLAT reads an image as ``size`` numbers one after the other; else they are the channels,
    rows and columns given, in an order near that of the memory.
    """
    DTYPE: tl.constexpr = partial_ptr.dtype.element_ty
    weight = tl.zeros([BLOCK_N], DTYPE)
    if ONE_BLOCK:  # of images: the same for all coordinates
        n = tl.arange(0, BLOCK_N)
        weight = _image_weights(norm_ptr, n, batch, parts, ARE_WEIGHTS, DTYPE, BLOCK_PARTS)
    squares = tl.zeros([BLOCK], DTYPE)
    mine = tl.program_id(0).to(tl.int64)
    for block in range(mine, tl.cdiv(size, BLOCK), tl.num_programs(0)):
        d = block * BLOCK + tl.arange(0, BLOCK)
        place = d
        if not FLAT:
            if CHANNELS_LAST:
                c, h, w = d % channels, d // channels // width, d // channels % width
            else:
                c, h, w = d // width // height, d // width % height, d % width
            place = c * stride_c + h * stride_h + w * stride_w
        total = tl.zeros([BLOCK_N, BLOCK], DTYPE)
        for first in range(0, batch, BLOCK_N):
            n = first + tl.arange(0, BLOCK_N)
            if not ONE_BLOCK:
                weight = _image_weights(norm_ptr, n, batch, parts, ARE_WEIGHTS, DTYPE, BLOCK_PARTS)
            row = x_ptr + n[:, None].to(tl.int64) * stride_n
            mask = (n[:, None] < batch) & (d[None, :] < size)
            total += _load(row + place[None, :], mask, DTYPE) * weight[:, None]
        sums = tl.sum(total, 0)
        squares += sums * sums
    tl.store(partial_ptr + tl.program_id(0), tl.sum(squares, 0))


@triton.jit
def _store_similarity(
    row_ptr,
    norm_ptr,
    partial_ptr,
    batch,
    pairs,
    parts,
    partials,
    DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    nonzero = tl.zeros([BLOCK_N], DTYPE)
    overflow = tl.zeros([BLOCK_N], DTYPE)
    for first in range(0, batch, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        norm = _squared_norms(norm_ptr, n, batch, parts, DTYPE, BLOCK_PARTS)
        nonzero += tl.where(norm > 0, 1.0, 0.0)
        overflow += tl.where(_is_finite(norm), 0.0, 1.0)
    total = tl.zeros([BLOCK], DTYPE)
    for first in range(0, partials, BLOCK):
        at = first + tl.arange(0, BLOCK)
        total += _load(partial_ptr + at, at < partials, DTYPE)
    similarity = (tl.sum(total, 0) - tl.sum(nonzero, 0)) / pairs
    defined = (tl.sum(overflow, 0) == 0) & _is_finite(similarity)
    tl.store(row_ptr + 1, tl.where(defined, pairs, 0))
    tl.store(row_ptr + 2, tl.where(defined, similarity, 0.0))


@triton.jit(do_not_specialize=['batch', 'splits', 'count', 'pairs', 'parts', 'partials'])
def finish_row(
    mean_ptr,
    square_ptr,
    image_mean_ptr,
    center_weight_ptr,
    norm_ptr,
    partial_ptr,
    row_ptr,
    batch,
    channels,
    pixels,
    share,
    splits,
    count,
    pairs,
    parts,
    partials,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    r"""The row of :meth:`mmubn.ops.interface.Backend.measure`.

    A program for each block of channels puts the shares of the pixels together and takes
    :math:`\mu` and :math:`\sigma^2` over the images; one more, where it was measured, the
    similarity.
    """
    DTYPE: tl.constexpr = row_ptr.dtype.element_ty
    block = tl.program_id(0)
    if block == 0:
        tl.store(row_ptr, count)
        if norm_ptr is None:
            tl.store(row_ptr + 1, 0.0)
            tl.store(row_ptr + 2, 0.0)
    if norm_ptr is not None and block == tl.cdiv(channels, BLOCK_C):
        _store_similarity(
            row_ptr,
            norm_ptr,
            partial_ptr,
            batch,
            pairs,
            parts,
            partials,
            DTYPE,
            BLOCK_N,
            BLOCK_PARTS,
            BLOCK,
        )
    else:
        c = block * BLOCK_C + tl.arange(0, BLOCK_C)
        calibration = tl.full([BLOCK_C], 1.0, DTYPE)
        if center_weight_ptr is not None:
            calibration += _load(center_weight_ptr + c, c < channels, DTYPE)
        mean = tl.zeros([BLOCK_C], DTYPE)
        square = tl.zeros([BLOCK_C], DTYPE)  # between images
        within = tl.zeros([BLOCK_N, BLOCK_C], DTYPE)
        for first in range(0, batch, BLOCK_N):
            n = first + tl.arange(0, BLOCK_N)
            mask = (n[:, None] < batch) & (c[None, :] < channels)
            image_mean = tl.zeros([BLOCK_N, BLOCK_C], DTYPE)
            # Many at a time: one after the other, each would wait for memory.
            for first_split in range(0, splits, BLOCK_SPLITS):
                split = (first_split + tl.arange(0, BLOCK_SPLITS))[:, None, None]
                known = (split < splits) & mask[None, :, :]
                place = (split * batch + n[None, :, None]).to(tl.int64) * channels
                place += c[None, None, :]
                own = tl.maximum(tl.minimum(share, pixels - split * share), 0).to(DTYPE)
                before = first_split * share
                here = tl.minimum(BLOCK_SPLITS * share, pixels - before)
                means = _load(mean_ptr + place, known, DTYPE)
                here_mean = tl.sum(means * own, 0) / here
                centred = tl.where(known, means - here_mean[None, :, :], 0.0)
                rounding = tl.sum(centred * own, 0) / here
                rounding = tl.where(_is_finite(rounding), rounding, 0.0)
                here_mean += rounding
                centred -= rounding[None, :, :]
                squares = _load(square_ptr + place, known, DTYPE)
                step = here_mean - image_mean
                weight = here.to(DTYPE) / (before + here)
                image_mean += step * weight
                within += tl.sum(squares + own * centred * centred, 0)
                within += step * (step * (before * weight))
            if image_mean_ptr is not None:
                place = n[:, None].to(tl.int64) * channels + c[None, :]
                tl.store(image_mean_ptr + place, image_mean, mask=mask)
            image_mean *= calibration[None, :]
            here = tl.minimum(BLOCK_N, batch - first)
            weight = here.to(DTYPE) / (first + here)
            here_mean = tl.sum(tl.where(mask, image_mean, 0.0), 0) / here
            centred = tl.where(mask, image_mean - here_mean[None, :], 0.0)
            step = here_mean - mean
            mean += step * weight
            square += tl.sum(centred * centred, 0) + step * (step * (first * weight))
        var = tl.sum(within, 0) / count + square / batch
        tl.store(row_ptr + 3 + c, mean, mask=c < channels)
        tl.store(row_ptr + 3 + channels + c, var, mask=c < channels)


@triton.jit
def _merge(
    rows_ptr,
    c,
    channels,
    total,
    RANKS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    r""":math:`\mu` and :math:`\sigma^2` over the rows of all processes."""
    mask = c < channels
    row_ptr = rows_ptr + 3 + c
    if RANKS == 1:
        mean = _load(row_ptr, mask, DTYPE)
        var = _load(row_ptr + channels, mask, DTYPE)
    else:
        mean = tl.zeros(c.shape, DTYPE)
        var = tl.zeros(c.shape, DTYPE)
        for rank in range(RANKS):
            at = rank * (2 * channels + 3)
            mean += tl.load(rows_ptr + at) / total * _load(row_ptr + at, mask, DTYPE)
        for rank in range(RANKS):
            at = rank * (2 * channels + 3)
            step = _load(row_ptr + at, mask, DTYPE) - mean
            inside = _load(row_ptr + at + channels, mask, DTYPE)
            var += tl.load(rows_ptr + at) / total * (inside + step * step)
    return mean, var


@triton.jit
def decide(
    rows_ptr,
    statistics_ptr,
    running_mean_ptr,
    running_var_ptr,
    tracked_ptr,
    tau_ptr,
    gate_ptr,
    channels,
    warmup,
    eps: tl.float64,
    momentum: tl.float64,
    fct: tl.float64,
    similarity_weight: tl.float64,
    RANKS: tl.constexpr,
    GATED: tl.constexpr,
    UPDATE: tl.constexpr,
    CUMULATIVE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Similarity, gate, running statistics, and the statistics that normalise. One program.

    Barriers keep a thread from writing a buffer that another has still to read.
    """
    DTYPE: tl.constexpr = statistics_ptr.dtype.element_ty
    eps = tl.full((), eps, DTYPE)
    total = tl.full((), 0.0, DTYPE)
    pairs = tl.full((), 0.0, DTYPE)
    similarities = tl.full((), 0.0, DTYPE)
    if rows_ptr is not None:
        for rank in range(RANKS):
            row_ptr = rows_ptr + rank * (2 * channels + 3)
            total += tl.load(row_ptr)
            pairs += tl.load(row_ptr + 1)
            similarities += tl.load(row_ptr + 1) * tl.load(row_ptr + 2)
    values = tl.maximum(total, 1.0)
    share = 1.0 / values
    gate = rows_ptr is not None
    if GATED:
        if UPDATE:
            tau = tl.load(tau_ptr).to(DTYPE)
            newest = similarities / tl.where(pairs > 0, pairs, 1.0)
            moved = _lerp(tau, newest, tl.full((), similarity_weight, DTYPE))
            # Undefined for N = 1 and for a batch that is not finite: neither may enter.
            tau = tl.where((pairs > 0) & _is_finite(newest), moved, tau)
            tau = tau.to(tau_ptr.dtype.element_ty)
            gate = tau.to(DTYPE) > tl.full((), fct, DTYPE)
            gate = gate | (tl.load(tracked_ptr) < warmup)
            tl.debug_barrier()
            tl.store(tau_ptr, tau)
            tl.store(gate_ptr, gate)
        else:
            gate = tl.load(gate_ptr)
        share = tl.where(gate, share, 0.0)
    finite = tl.full([BLOCK_C], 1, tl.int32)
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        mask = c < channels
        if rows_ptr is not None:
            mean, var = _merge(rows_ptr, c, channels, values, RANKS, DTYPE)
            unbiased = var * (total / (total - 1))
            finite = finite & (_is_finite(mean) & _is_finite(unbiased) | ~mask).to(tl.int32)
        else:
            mean = _load(running_mean_ptr + c, mask, DTYPE)
            var = _load(running_var_ptr + c, mask, DTYPE)
            share = tl.full((), 0.0, DTYPE)
        if GATED:
            mean = tl.where(gate, mean, _load(running_mean_ptr + c, mask, DTYPE))
            var = tl.where(gate, var, _load(running_var_ptr + c, mask, DTYPE))
        tl.store(statistics_ptr + c, mean, mask=mask)
        tl.store(statistics_ptr + channels + c, tl.rsqrt(var + eps), mask=mask)
    tl.store(statistics_ptr + 2 * channels, share)
    if UPDATE:
        # One value has no unbiased variance, none has no mean.
        allowed = (total > 1) & gate & (tl.min(finite, 0) == 1)
        tracked = tl.load(tracked_ptr) + allowed.to(tl.int64)
        weight = tl.full((), momentum, DTYPE)
        if CUMULATIVE:
            weight = 1.0 / tl.maximum(tracked, 1).to(DTYPE)
        tl.debug_barrier()
        tl.store(tracked_ptr, tracked)
        for first in range(0, channels, BLOCK_C):
            c = first + tl.arange(0, BLOCK_C)
            mask = c < channels
            mean, var = _merge(rows_ptr, c, channels, values, RANKS, DTYPE)
            unbiased = var * (total / (total - 1))
            old_mean = _load(running_mean_ptr + c, mask, DTYPE)
            old_var = _load(running_var_ptr + c, mask, DTYPE)
            mean = tl.where(allowed, _lerp(old_mean, mean, weight), old_mean)
            var = tl.where(allowed, _lerp(old_var, unbiased, weight), old_var)
            tl.debug_barrier()
            tl.store(running_mean_ptr + c, mean, mask=mask)
            tl.store(running_var_ptr + c, var, mask=mask)


@triton.jit
def _program(channels, width, rows, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr):
    """Image (or group of them), channels, columns and first row of this program.

    The first is of 64 bits, as what is multiplied with strides must be. Rows are of 32 bits: the
    loops compare them often, and go from row to row by pointers.
    """
    blocks_c, blocks_w = tl.cdiv(channels, BLOCK_C), tl.cdiv(width, BLOCK_W)
    n = (tl.program_id(0) // blocks_c).to(tl.int64)
    c = (tl.program_id(0) % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    w = (tl.program_id(1) % blocks_w) * BLOCK_W + tl.arange(0, BLOCK_W)
    return n, c, w, tl.program_id(1) // blocks_w * rows


@triton.jit
def _place(ptr, n, c, row, w, stride_n, stride_c, stride_h, stride_w):
    """Pointers to the channels and columns of a row, which may be outside of the image."""
    image = ptr + n * stride_n + row.to(tl.int64) * stride_h
    return image + c[:, None].to(tl.int64) * stride_c + w[None, :].to(tl.int64) * stride_w


@triton.jit
def _load_taps(
    weight_ptr,
    kernel_ptr,
    scale,
    c,
    channels,
    DTYPE: tl.constexpr,
    K: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """``scale`` times the k^2 taps, (BLOCK_C, 1) each, row by row; REVERSE begins with the last."""
    mask = c < channels
    weight = tl.zeros(c.shape, DTYPE) + scale
    if weight_ptr is not None:
        weight *= _load(weight_ptr + c, mask, DTYPE)
    taps = ()
    for index in tl.static_range(K * K):
        place = K * K - 1 - index if REVERSE else index
        tap = weight
        if kernel_ptr is not None:
            tap = weight * _load(kernel_ptr + c * (K * K) + place, mask, DTYPE)
        taps = taps + (tap[:, None],)
    return taps


@triton.jit
def _load_row(
    place,
    center,
    inside,
    w,
    width,
    stride_w,
    shift,
    SHIFTED: tl.constexpr,
    DTYPE: tl.constexpr,
    K: tl.constexpr,
):
    """A row from -p to p columns aside, zero outside of the image; plus ``shift`` where SHIFTED.

    ``inside`` masks channels, columns and the row; ``center`` is what was read ahead of it.
    """
    shifted = ()
    for j in tl.static_range(K):
        column = w[None, :] + (j - K // 2)
        mask = inside & (column >= 0) & (column < width)
        x = center.to(DTYPE)
        if j != K // 2:
            # Added last: where the stride is 1, no instruction but a part of the load's address.
            x = _load(place + (j - K // 2) * stride_w, mask, DTYPE)
        if SHIFTED:
            x = tl.where(mask, x + shift, 0.0)
        shifted = shifted + (x,)
    return shifted


@triton.jit
def _read_ahead(place, stride, columns, row, first, last, ROWS: tl.constexpr):
    """``row`` and the next ones, as they are in memory, zero outside of [first, last)."""
    rows = ()
    for i in tl.static_range(ROWS):
        mask = columns & (row + i >= first) & (row + i < last)
        rows = rows + (tl.load(place + i * stride, mask=mask, other=0.0),)
    return rows


@triton.jit
def _add_row(sums, shifted, taps, K: tl.constexpr):
    """Adds a row to the k rows of the output that it touches, ``sums``, the lowest first."""
    for j in tl.static_range(K):
        added = ()
        for i in tl.static_range(K):
            added = added + (sums[i] + taps[i * K + j] * shifted[j],)
        sums = added
    return sums


@triton.jit(do_not_specialize=['height', 'rows'])
def write_output(
    x_ptr,
    y_ptr,
    image_mean_ptr,
    statistics_ptr,
    weight_ptr,
    kernel_ptr,
    bias_ptr,
    center_weight_ptr,
    scale_weight_ptr,
    scale_bias_ptr,
    channels,
    height,
    width,
    rows,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    y_stride_n,
    y_stride_c,
    y_stride_h,
    y_stride_w,
    SCALE_FROM_INPUT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_W: tl.constexpr,
    K: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """``Y = dwconv(a (X + h); K) + beta``."""
    DTYPE: tl.constexpr = statistics_ptr.dtype.element_ty
    n, c, w, first = _program(channels, width, rows, BLOCK_C, BLOCK_W)
    _, shift, _, factor, rstd = _coefficients(
        n,
        c,
        c < channels,
        channels,
        image_mean_ptr,
        statistics_ptr,
        center_weight_ptr,
        scale_weight_ptr,
        scale_bias_ptr,
        SCALE_FROM_INPUT,
        DTYPE,
    )
    shift = shift[:, None]
    scale = factor * rstd
    taps = _load_taps(weight_ptr, kernel_ptr, scale, c, channels, DTYPE, K, REVERSE=False)
    bias = tl.zeros([BLOCK_C, BLOCK_W], DTYPE)
    if bias_ptr is not None:
        bias += _load(bias_ptr + c, c < channels, DTYPE)[:, None]
    columns = (c[:, None] < channels) & (w[None, :] < width)
    place = _place(x_ptr, n, c, first - K // 2, w, stride_n, stride_c, stride_h, stride_w)
    out = _place(y_ptr, n, c, first - K // 2 * 2, w, y_stride_n, y_stride_c, y_stride_h, y_stride_w)
    sums = (bias,) * K
    last = tl.minimum(first + rows, height)
    end = tl.minimum(last + K // 2, height)
    ahead = _read_ahead(place, stride_h, columns, first - K // 2, 0, end, AHEAD)
    for step in range(last - first + 2 * (K // 2)):
        q = first - K // 2 + step
        inside = columns & (q >= 0) & (q < height)
        further = place + AHEAD * stride_h
        ahead = ahead + _read_ahead(further, stride_h, columns, q + AHEAD, 0, end, 1)
        center, ahead = ahead[0], ahead[1:]
        shifted = _load_row(place, center, inside, w, width, stride_w, shift, True, DTYPE, K)
        sums = _add_row(sums, shifted, taps, K)
        h = q - K // 2
        y = sums[K - 1].to(y_ptr.dtype.element_ty)
        tl.store(out, y, mask=columns & (h >= first))
        sums = (bias,) + sums[: K - 1]
        place += stride_h
        out += y_stride_h


@triton.jit
def _tap_rows(taps, w, width, DTYPE: tl.constexpr, K: tl.constexpr):
    """For each row of the taps the sum of those that find X inside of the image from columns w."""
    rows = ()
    for i in tl.static_range(K):
        row = tl.zeros([taps[0].shape[0], w.shape[0]], DTYPE)
        for j in tl.static_range(K):
            column = w[None, :] + (j - K // 2)
            row += tl.where((column >= 0) & (column < width), taps[i * K + j], 0.0)
        rows = rows + (row,)
    return rows


@triton.jit
def _add_input_gradient(total, tap_rows, dy, q, height, K: tl.constexpr):
    """Adds row q of dY times the taps that find X from there: its share of the sum of dX_r."""
    for i in tl.static_range(K):
        h = q + i - K // 2
        if (h >= 0) & (h < height):
            total += tap_rows[i] * dy
    return total


@triton.jit
def _multiply_rows(products, shifted, dys, h, height, K: tl.constexpr):
    """Adds row h of X times the k rows of dY that it touches.

    Not those outside of the image: zeros, which an X that is not finite may not meet.
    """
    added = ()
    for i in tl.static_range(K):
        q = h - i + K // 2
        row = products[i * K : (i + 1) * K]
        if (q >= 0) & (q < height):
            row = _multiply_row(row, shifted, dys[i], K)
        added = added + row
    return added


@triton.jit
def _multiply_row(products, shifted, dy, K: tl.constexpr):
    added = ()
    for j in tl.static_range(K):
        added = added + (products[j] + shifted[j] * dy,)
    return added


@triton.jit(do_not_specialize=['height', 'rows'])
def sum_pixels(
    x_ptr,
    dy_ptr,
    image_mean_ptr,
    statistics_ptr,
    weight_ptr,
    kernel_ptr,
    center_weight_ptr,
    scale_weight_ptr,
    scale_bias_ptr,
    d_scale_ptr,
    d_shift_ptr,
    d_taps_ptr,
    d_bias_ptr,
    batch,
    share,
    channels,
    height,
    width,
    rows,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    dy_stride_n,
    dy_stride_c,
    dy_stride_h,
    dy_stride_w,
    SCALE_FROM_INPUT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_W: tl.constexpr,
    K: tl.constexpr,
    AHEAD: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """A program's pixels of dY meet all of X within p of them, image after image of its share.

    With P the k^2 sums of (X + h) and dY shifted, those of (X + h) dX_r and of the taps are
    sums of K P and of a P: the loop needs no dX_r, and of the taps their sums by rows alone.
    """
    DTYPE: tl.constexpr = statistics_ptr.dtype.element_ty
    group, c, w, first = _program(channels, width, rows, BLOCK_C, BLOCK_W)
    tile = tl.program_id(1).to(tl.int64)
    last = tl.minimum(first + rows, height)
    end = tl.minimum(last + K // 2, height)
    columns = (c[:, None] < channels) & (w[None, :] < width)
    zero = tl.zeros([BLOCK_C, BLOCK_W], DTYPE)
    taps = _load_taps(weight_ptr, kernel_ptr, 1.0, c, channels, DTYPE, K, REVERSE=False)
    tap_rows = _tap_rows(taps, w, width, DTYPE, K)
    d_taps = (zero,) * (K * K)
    d_bias = zero
    for index in range(tl.minimum(share, batch - group * share)):
        n = group * share + index
        _, shift, _, factor, rstd = _coefficients(
            n,
            c,
            c < channels,
            channels,
            image_mean_ptr,
            statistics_ptr,
            center_weight_ptr,
            scale_weight_ptr,
            scale_bias_ptr,
            SCALE_FROM_INPUT,
            DTYPE,
        )
        scale = (factor * rstd)[:, None]
        place = _place(x_ptr, n, c, first - K // 2, w, stride_n, stride_c, stride_h, stride_w)
        dy_place = _place(
            dy_ptr, n, c, first, w, dy_stride_n, dy_stride_c, dy_stride_h, dy_stride_w
        )
        products = (zero,) * (K * K)
        d_x_r = zero
        dys = (zero,) * K  # rows h + p, ..., h - p of dY, zero outside of the tile
        ahead = _read_ahead(place, stride_h, columns, first - K // 2, 0, end, AHEAD)
        dy_ahead = _read_ahead(dy_place, dy_stride_h, columns, first, 0, last, AHEAD)
        dy_place += AHEAD * dy_stride_h
        for step in tl.range(0, last - first + 2 * (K // 2), loop_unroll_factor=UNROLL):
            q = first + step
            next_dy = _read_ahead(dy_place, dy_stride_h, columns, q + AHEAD, 0, last, 1)
            dy_ahead = dy_ahead + next_dy
            dy, dy_ahead = dy_ahead[0].to(DTYPE), dy_ahead[1:]
            d_bias += dy
            d_x_r = _add_input_gradient(d_x_r, tap_rows, dy, q, height, K)
            dys = (dy,) + dys[: K - 1]
            h = q - K // 2
            inside = columns & (h >= 0) & (h < height)
            further = place + AHEAD * stride_h
            ahead = ahead + _read_ahead(further, stride_h, columns, h + AHEAD, 0, end, 1)
            center, ahead = ahead[0], ahead[1:]
            shifted = _load_row(
                place, center, inside, w, width, stride_w, shift[:, None], True, DTYPE, K
            )
            products = _multiply_rows(products, shifted, dys, h, height, K)
            place += stride_h
            dy_place += dy_stride_h
        taps = _load_taps(weight_ptr, kernel_ptr, 1.0, c, channels, DTYPE, K, REVERSE=False)
        d_scale = zero
        added = ()
        for at in tl.static_range(K * K):
            d_scale += taps[at] * products[at]
            added = added + (d_taps[at] + scale * products[at],)
        d_taps = added
        out = (tile * batch + n) * channels + c
        tl.store(d_scale_ptr + out, tl.sum(d_scale, 1), mask=c < channels)
        tl.store(d_shift_ptr + out, factor * rstd * tl.sum(d_x_r, 1), mask=c < channels)
    part = (group * tl.num_programs(1) + tile) * channels + c
    tl.store(d_bias_ptr + part, tl.sum(d_bias, 1), mask=c < channels)
    if d_taps_ptr is not None:
        for at in tl.static_range(K * K):
            d_tap = tl.sum(d_taps[at], 1)
            tl.store(d_taps_ptr + part * (K * K) + at, d_tap, mask=c < channels)


@triton.jit
def _store_affine_gradients(
    c,
    weight_ptr,
    kernel_ptr,
    d_taps_part_ptr,
    d_bias_part_ptr,
    d_weight_ptr,
    d_kernel_ptr,
    d_bias_ptr,
    channels,
    parts,
    DTYPE: tl.constexpr,
    K: tl.constexpr,
    BLOCK_TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradients of one channel."""
    at = tl.arange(0, BLOCK_TAPS)
    d_taps = tl.zeros([BLOCK, BLOCK_TAPS], DTYPE)
    d_bias = tl.zeros([BLOCK], DTYPE)
    for first in range(0, parts, BLOCK):
        part = first + tl.arange(0, BLOCK)
        place = part.to(tl.int64) * channels + c
        d_bias += _load(d_bias_part_ptr + place, part < parts, DTYPE)
        if weight_ptr is not None:
            mask = (part[:, None] < parts) & (at[None, :] < K * K)
            taps_ptr = d_taps_part_ptr + place[:, None] * (K * K) + at[None, :]
            d_taps += _load(taps_ptr, mask, DTYPE)
    tl.store(d_bias_ptr + c, tl.sum(d_bias, 0))
    if weight_ptr is not None:
        sums = tl.sum(d_taps, 0)
        if kernel_ptr is not None:
            place = c * (K * K) + at
            d_kernel = sums * tl.load(weight_ptr + c).to(DTYPE)
            tl.store(d_kernel_ptr + place, d_kernel, mask=at < K * K)
            sums *= _load(kernel_ptr + place, at < K * K, DTYPE)
        tl.store(d_weight_ptr + c, tl.sum(sums, 0))


@triton.jit(do_not_specialize=['batch', 'tiles', 'parts'])
def reduce_sums(
    d_scale_part_ptr,
    d_shift_part_ptr,
    d_taps_part_ptr,
    d_bias_part_ptr,
    image_mean_ptr,
    statistics_ptr,
    weight_ptr,
    kernel_ptr,
    center_weight_ptr,
    scale_weight_ptr,
    scale_bias_ptr,
    d_statistics_ptr,
    d_weight_ptr,
    d_kernel_ptr,
    d_bias_ptr,
    d_scale_weight_ptr,
    d_scale_bias_ptr,
    d_shift_ptr,
    d_gap_ptr,
    center_sums_ptr,
    batch,
    channels,
    tiles,
    parts,
    SCALE_FROM_INPUT: tl.constexpr,
    K: tl.constexpr,
    BLOCK_TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    r"""From the sums of :func:`sum_pixels` to the gradients of the parameters, :math:`\mu` and
    :math:`\sigma^2`.

    A program for each block of channels follows the shift h and the scale a; one for each
    channel adds up what reached the affine.
    """
    DTYPE: tl.constexpr = statistics_ptr.dtype.element_ty
    blocks = tl.cdiv(channels, BLOCK_C)
    if tl.program_id(0) >= blocks:
        _store_affine_gradients(
            tl.program_id(0) - blocks,
            weight_ptr,
            kernel_ptr,
            d_taps_part_ptr,
            d_bias_part_ptr,
            d_weight_ptr,
            d_kernel_ptr,
            d_bias_ptr,
            channels,
            parts,
            DTYPE,
            K,
            BLOCK_TAPS,
            BLOCK,
        )
    else:
        c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
        zero = tl.zeros([BLOCK_N, BLOCK_C], DTYPE)
        d_mean, d_rstd, d_scale_weight, d_scale_bias = zero, zero, zero, zero
        shift_by_mean, mean_sum, centred_by_mean = zero, zero, zero
        rstd = _load(statistics_ptr + channels + c, c < channels, DTYPE)
        for first in range(0, batch, BLOCK_N):
            n = first + tl.arange(0, BLOCK_N)[:, None].to(tl.int64)
            mask = (n < batch) & (c < channels)
            image_mean, shift, pooled, factor, _ = _coefficients(
                n,
                c + tl.zeros([BLOCK_N, 1], tl.int32),
                mask,
                channels,
                image_mean_ptr,
                statistics_ptr,
                center_weight_ptr,
                scale_weight_ptr,
                scale_bias_ptr,
                SCALE_FROM_INPUT,
                DTYPE,
            )
            centred = image_mean + shift  # (1 + w_m) m - mu
            d_scale, d_shift = zero, zero
            # Many at a time: one after the other, each would wait for memory.
            for first_tile in range(0, tiles, BLOCK_TILES):
                tile = (first_tile + tl.arange(0, BLOCK_TILES))[:, None, None]
                known = (tile < tiles) & mask[None, :, :]
                place = (tile * batch + n[None, :, :]) * channels + c[None, :, :]
                d_scale += tl.sum(_load(d_scale_part_ptr + place, known, DTYPE), 0)
                d_shift += tl.sum(_load(d_shift_part_ptr + place, known, DTYPE), 0)
            d_rstd += d_scale * factor
            if scale_weight_ptr is not None:
                d_logit = d_scale * rstd * factor * (1 - factor)
                d_scale_weight += d_logit * pooled
                d_scale_bias += d_logit
                d_gap = d_logit * _load(scale_weight_ptr + c, c < channels, DTYPE)
                if not SCALE_FROM_INPUT:
                    d_rstd += d_gap * centred
                    d_gap *= rstd
                    d_shift += d_gap
                tl.store(d_gap_ptr + n * channels + c, d_gap, mask=mask)
            tl.store(d_shift_ptr + n * channels + c, d_shift, mask=mask)
            d_mean -= d_shift
            if center_weight_ptr is not None:
                shift_by_mean += d_shift * image_mean
                mean_sum += image_mean
                centred_by_mean += centred * image_mean
        c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
        known = c < channels
        rstd = _load(statistics_ptr + channels + c, known, DTYPE)
        d_var = -0.5 * rstd * (rstd * (rstd * tl.sum(d_rstd, 0)))
        tl.store(d_statistics_ptr + c, tl.sum(d_mean, 0), mask=known)
        tl.store(d_statistics_ptr + channels + c, d_var, mask=known)
        if scale_weight_ptr is not None:
            tl.store(d_scale_weight_ptr + c, tl.sum(d_scale_weight, 0), mask=known)
            tl.store(d_scale_bias_ptr + c, tl.sum(d_scale_bias, 0), mask=known)
        if center_weight_ptr is not None:
            tl.store(center_sums_ptr + c, tl.sum(shift_by_mean, 0), mask=known)
            tl.store(center_sums_ptr + channels + c, tl.sum(mean_sum, 0), mask=known)
            tl.store(center_sums_ptr + 2 * channels + c, tl.sum(centred_by_mean, 0), mask=known)


@triton.jit(do_not_specialize=['height', 'rows'])
def write_input_gradient(
    x_ptr,
    dy_ptr,
    dx_ptr,
    image_mean_ptr,
    statistics_ptr,
    d_statistics_ptr,
    d_shift_ptr,
    d_gap_ptr,
    center_sums_ptr,
    weight_ptr,
    kernel_ptr,
    center_weight_ptr,
    scale_weight_ptr,
    scale_bias_ptr,
    d_center_weight_ptr,
    channels,
    height,
    width,
    rows,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    dy_stride_n,
    dy_stride_c,
    dy_stride_h,
    dy_stride_w,
    dx_stride_n,
    dx_stride_c,
    dx_stride_h,
    dx_stride_w,
    SCALE_FROM_INPUT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_W: tl.constexpr,
    K: tl.constexpr,
    AHEAD: tl.constexpr,
):
    r"""``dX = a dX_r + 2 dsigma^2 (X - m) + level``, dX_r made anew from dY; and the gradient of
    the center weight.
    """
    DTYPE: tl.constexpr = statistics_ptr.dtype.element_ty
    n, c, w, first = _program(channels, width, rows, BLOCK_C, BLOCK_W)
    known = c < channels
    image_mean, shift, _, factor, rstd = _coefficients(
        n,
        c,
        known,
        channels,
        image_mean_ptr,
        statistics_ptr,
        center_weight_ptr,
        scale_weight_ptr,
        scale_bias_ptr,
        SCALE_FROM_INPUT,
        DTYPE,
    )
    scale = (factor * rstd)[:, None]
    # Statistics of the batch depend on X, running ones do not.
    share = tl.load(statistics_ptr + 2 * channels)
    moving = share > 0
    d_mean = tl.where(moving, _load(d_statistics_ptr + c, known, DTYPE) * share, 0.0)
    d_var = tl.where(moving, _load(d_statistics_ptr + channels + c, known, DTYPE) * share, 0.0)
    through_statistics = d_mean + 2 * d_var * (image_mean + shift)
    level = tl.where(moving, through_statistics, 0.0)
    if center_weight_ptr is not None:
        center_weight = _load(center_weight_ptr + c, known, DTYPE)
        d_shift = _load(d_shift_ptr + n * channels + c, known, DTYPE)
        level += center_weight * (d_shift / (height * width) + level)
        if (n == 0) & (tl.program_id(1) == 0):
            shift_by_mean = _load(center_sums_ptr + c, known, DTYPE)
            mean_sum = _load(center_sums_ptr + channels + c, known, DTYPE)
            centred_by_mean = _load(center_sums_ptr + 2 * channels + c, known, DTYPE)
            through_statistics = d_mean * mean_sum + 2 * d_var * centred_by_mean
            through_statistics = tl.where(moving, through_statistics, 0.0) * (height * width)
            tl.store(d_center_weight_ptr + c, shift_by_mean + through_statistics, mask=known)
    if d_gap_ptr is not None:
        level += _load(d_gap_ptr + n * channels + c, known, DTYPE) / (height * width)
    # dX_r[h, w] sums K[i, j] dY[h - i + p, w - j + p]: the forward with K reversed.
    taps = _load_taps(weight_ptr, kernel_ptr, 1.0, c, channels, DTYPE, K, REVERSE=True)
    columns = known[:, None] & (w[None, :] < width)
    top = first - K // 2
    dy_place = _place(dy_ptr, n, c, top, w, dy_stride_n, dy_stride_c, dy_stride_h, dy_stride_w)
    top -= K // 2
    place = _place(x_ptr, n, c, top, w, stride_n, stride_c, stride_h, stride_w)
    out = _place(dx_ptr, n, c, top, w, dx_stride_n, dx_stride_c, dx_stride_h, dx_stride_w)
    zero = tl.zeros([BLOCK_C, BLOCK_W], DTYPE)
    sums = (zero,) * K
    last = tl.minimum(first + rows, height)
    end = tl.minimum(last + K // 2, height)
    row = first - K // 2
    dy_ahead = _read_ahead(dy_place, dy_stride_h, columns, row, 0, end, AHEAD)
    ahead = _read_ahead(place, stride_h, columns, row - K // 2, first, last, AHEAD)
    place += AHEAD * stride_h
    for step in range(last - first + 2 * (K // 2)):
        q = first - K // 2 + step
        inside = columns & (q >= 0) & (q < height)
        further = dy_place + AHEAD * dy_stride_h
        dy_ahead = dy_ahead + _read_ahead(further, dy_stride_h, columns, q + AHEAD, 0, end, 1)
        center, dy_ahead = dy_ahead[0], dy_ahead[1:]
        shifted = _load_row(dy_place, center, inside, w, width, dy_stride_w, 0.0, False, DTYPE, K)
        sums = _add_row(sums, shifted, taps, K)
        h = q - K // 2
        mask = columns & (h >= first)
        ahead = ahead + _read_ahead(place, stride_h, columns, h + AHEAD, first, last, 1)
        centred, ahead = ahead[0].to(DTYPE) - image_mean[:, None], ahead[1:]
        through_var = tl.where(moving, (2 * d_var)[:, None] * centred, 0.0)
        dx = scale * sums[K - 1] + (through_var + level[:, None])
        tl.store(out, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        sums = (zero,) + sums[: K - 1]
        dy_place += dy_stride_h
        place += stride_h
        out += dx_stride_h

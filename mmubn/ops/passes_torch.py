"""The passes over the large tensors, in plain torch: any device, any float dtype, any k.

:mod:`mmubn.ops.ubn` does the rest on numbers per image and channel. On the CPU each
pass works in cache-sized slices of the batch, as a fresh temporary of X's size costs
more there than its arithmetic.

Symbols as in :mod:`mmubn.ops.ubn`: coefficients per image and channel are (N, C), K is
(C, k, k), both in the dtype of the statistics.
"""

from typing import NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .utils import batch_slices, over_batch, plane, slices, statistics_dtype


class Gradients(NamedTuple):
    """What :func:`backward_sums` finds; ``d_x_r`` is for :func:`backward_input` alone."""

    d_scale: Tensor  # (N, C), sum over H and W of (X + h) dX_r
    d_shift: Tensor  # (N, C), a times the sum over H and W of dX_r
    d_taps: Tensor  # (C, k, k)
    d_bias: Tensor  # (C,)
    d_x_r: Optional[Tensor]  # (N, C, H, W), where the pass keeps it


def image_mean(x: Tensor) -> Tensor:
    """Mean over H and W, (N, C)."""
    dtype = statistics_dtype(x.dtype)
    return torch.cat([x[part].mean((2, 3), dtype=dtype) for part in batch_slices(x)])


def image_moments(x: Tensor) -> Tuple[Tensor, Tensor]:
    """Mean and biased variance over H and W, two of (N, C)."""
    mean = image_mean(x)
    parts = []
    for part in batch_slices(x):
        centred = x[part] - plane(mean[part])
        parts.append(torch.linalg.vector_norm(centred, dim=(2, 3)).square())
    return mean, torch.cat(parts) / (x.shape[2] * x.shape[3])


def squared_sum(x: Tensor, weight: Tensor) -> Tensor:
    """``|| sum_n weight_n X_n ||^2``, a scalar, with weight (N,)."""
    # The sum does not depend on the order of the coordinates: take that of the memory.
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        x = x.permute(0, 2, 3, 1)
    flat = x.flatten(1)
    # Slices of coordinates, each summed over the whole batch: nothing of size D is kept.
    with torch.autocast(x.device.type, enabled=False):  # it would send mv to half
        parts = [
            torch.mv(flat[:, part].to(weight.dtype).t(), weight).square().sum()
            for part in slices(x, flat.shape[1])
        ]
    return torch.stack(parts).sum()


def forward(
    x: Tensor, shift: Tensor, scale: Tensor, taps: Tensor, bias: Optional[Tensor]
) -> Tensor:
    """``Y = dwconv(a (X + h); K) + beta``, in the dtype and memory format of X."""

    def slice_of_y(part: slice) -> Tensor:
        return _convolve(_rectify(x[part], shift[part], scale[part]), taps, bias)

    # Autocast would send the convolution's float32 operands back to half.
    with torch.autocast(x.device.type, enabled=False):
        return over_batch(x, slice_of_y)


def backward_sums(x: Tensor, dy: Tensor, shift: Tensor, scale: Tensor, taps: Tensor) -> Gradients:
    """First backward pass: everything that is a sum over X's pixels, and dX_r."""
    d_scale = torch.empty_like(shift)
    d_shift = torch.empty_like(shift)
    d_taps = torch.zeros_like(taps)
    d_bias = torch.zeros_like(taps[:, 0, 0])
    d_x_r = torch.empty_like(x, dtype=taps.dtype)
    with torch.autocast(x.device.type, enabled=False):
        for part in batch_slices(x):
            shifted = x[part] + plane(shift[part])
            x_r = shifted * plane(scale[part])
            gradients = _convolve_backward(dy[part].to(taps.dtype), x_r, taps)
            d_x_r[part] = gradients[0]
            d_taps += gradients[1]
            d_bias += gradients[2]
            d_scale[part] = shifted.mul_(gradients[0]).sum((2, 3))
            d_shift[part] = gradients[0].sum((2, 3)) * scale[part]
    return Gradients(d_scale, d_shift, d_taps, d_bias, d_x_r)


def backward_input(
    x: Tensor,
    dy: Tensor,
    image_mean: Tensor,
    scale: Tensor,
    slope: Tensor,
    level: Tensor,
    taps: Tensor,
    d_x_r: Tensor,
) -> Tensor:
    """Second backward pass: ``dX = a dX_r + slope (X - m) + level``; writes into ``d_x_r``."""
    for part in batch_slices(x):
        through_statistics = _rectify(x[part], -image_mean[part], slope[part])
        d_x_r[part] *= plane(scale[part])
        d_x_r[part] += through_statistics.add_(plane(level[part]))
    return d_x_r.to(x.dtype)


def _rectify(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``scale * (x + shift)`` with (N, C) coefficients, in their dtype."""
    return (x + plane(shift)).mul_(plane(scale))


def _convolve(x: Tensor, taps: Tensor, bias: Optional[Tensor]) -> Tensor:
    if taps.shape[-1] == 1:
        # Not in place, see over_batch.
        weight = taps.view(1, -1, 1, 1)
        return x * weight if bias is None else torch.addcmul(bias.view(1, -1, 1, 1), x, weight)
    return F.conv2d(x, taps[:, None], bias, padding=taps.shape[-1] // 2, groups=len(taps))


def _convolve_backward(dy: Tensor, x: Tensor, taps: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`_convolve` for its input, taps and bias."""
    if taps.shape[-1] == 1:
        d_taps = (x * dy).sum((0, 2, 3)).view_as(taps)
        return dy * taps.view(1, -1, 1, 1), d_taps, dy.sum((0, 2, 3))
    channels, padding = len(taps), [taps.shape[-1] // 2] * 2
    dx, d_taps, d_bias = torch.ops.aten.convolution_backward(
        dy,
        x,
        taps[:, None],
        [channels],
        stride=[1, 1],
        padding=padding,
        dilation=[1, 1],
        transposed=False,
        output_padding=[0, 0],
        groups=channels,
        output_mask=[True, True, True],
    )
    return dx, d_taps.squeeze(1), d_bias

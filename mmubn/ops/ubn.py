r"""UBN's second stage, collapsed: one shift and one scale per image and channel, one convolution.

Symbols and shapes: X the input, (N, C, H, W); m its mean over H and W, (N, C);
:math:`\mu, \sigma^2` the statistics that normalise
:math:`X_c = X + w_m \odot m`, (C,); K the taps of the affine, (C, k, k). With

.. math::
    h = w_m m - \mu, \qquad
    t = (m + h) / \sqrt{\sigma^2 + \epsilon}, \qquad
    g = \mathrm{sigmoid}(w_v t + w_b), \qquad
    a = g / \sqrt{\sigma^2 + \epsilon},

all of shape (N, C), Eqs. 4 and 5 of the paper become

.. math::
    X_r = a \, (X + h), \qquad Y = \mathrm{dwconv}_k(X_r; K) + \beta .

So the backward pass needs X and O(N C) numbers, which is BatchNorm's memory; the
literal composition keeps three tensors of X's size. X + h is formed before it is
scaled, as a large mean would cancel badly in a X + b.
"""

from typing import Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .utils import batch_slices, over_batch, statistics_dtype


@torch.no_grad()
def image_moments(x: Tensor) -> Tuple[Tensor, Tensor]:
    """Mean and biased variance over H and W of every image and channel, without gradient.

    The variance is taken from centred values: E[x^2] - E[x]^2 cancels where the
    mean is large.

    Args:
        x (Tensor): (N, C, H, W), any float dtype and memory format.

    Returns:
        tuple[Tensor, Tensor]: Two of shape (N, C), float32 (float64 for float64
        input).
    """
    mean = image_mean(x)
    parts = []
    for part in batch_slices(x):
        centred = x[part] - _plane(mean[part])
        parts.append(torch.linalg.vector_norm(centred, dim=(2, 3)).square())
    return mean, torch.cat(parts) / (x.shape[2] * x.shape[3])


@torch.no_grad()
def image_mean(x: Tensor) -> Tensor:
    """Mean over H and W of every image and channel, as in :func:`image_moments`."""
    dtype = statistics_dtype(x.dtype)
    return torch.cat([x[part].mean((2, 3), dtype=dtype) for part in batch_slices(x)])


def batch_statistics(
    image_mean: Tensor, image_var: Tensor, center_weight: Optional[Tensor] = None
) -> Tuple[Tensor, Tensor]:
    r"""Mean and biased variance of :math:`X_c = X + w_m \odot m` over N, H and W.

    .. math::
        \mu_c = \mathrm{mean}_n [(1 + w_m) m], \qquad
        \sigma^2_c = \mathrm{mean}_n [v] + \mathrm{var}_n [(1 + w_m) m]

    Args:
        image_mean (Tensor): m, (N, C), of :func:`image_moments`.
        image_var (Tensor): v, (N, C), of :func:`image_moments`.
        center_weight (Tensor, optional): :math:`w_m`, (C,).

    Returns:
        tuple[Tensor, Tensor]: Two of shape (C,).
    """
    pooled = image_mean if center_weight is None else image_mean * (1 + center_weight)
    var, mean = torch.var_mean(pooled, dim=0, correction=0)
    return mean, var + image_var.mean(0)


def ubn(
    x: Tensor,
    image_mean: Tensor,
    mean: Tensor,
    var: Tensor,
    from_batch: Union[bool, Tensor],
    taps: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
    center_weight: Optional[Tensor] = None,
    scale_weight: Optional[Tensor] = None,
    scale_bias: Optional[Tensor] = None,
    eps: float = 1e-5,
    scale_from_input: bool = False,
) -> Tensor:
    r"""Centering, normalization, scaling and affine of UBN (Eqs. 4 and 5), with its own backward.

    ``image_mean``, ``mean`` and ``var`` come in as plain numbers; their dependence
    on ``x`` and ``center_weight`` is part of this function's backward, where
    ``from_batch`` says whether ``mean`` and ``var`` have one.

    Args:
        x (Tensor): X, (N, C, H, W), any float dtype and memory format.
        image_mean (Tensor): m, (N, C), of :func:`image_moments`.
        mean (Tensor): :math:`\mu`, (C,).
        var (Tensor): :math:`\sigma^2`, biased, (C,).
        from_batch (bool | Tensor): Whether ``mean`` and ``var`` are the
            :func:`batch_statistics` of ``x``; a bool or a scalar bool tensor, which
            is not read back to the host.
        taps (Tensor, optional): K, the effective kernel of the affine, (C, k, k)
            with odd k. Default: no affine.
        bias (Tensor, optional): :math:`\beta`, (C,).
        center_weight (Tensor, optional): :math:`w_m`, (C,).
        scale_weight (Tensor, optional): :math:`w_v`, (C,), together with
        scale_bias (Tensor, optional): :math:`w_b`, (C,).
        eps (float): :math:`\epsilon`.
        scale_from_input (bool): Whether the sigmoid sees m in place of t, as in IEBN.

    Returns:
        Tensor: Y, (N, C, H, W), in the dtype and memory format of ``x``.

    Raises:
        RuntimeError: On double backward, which is not implemented.
    """
    dtype = statistics_dtype(x.dtype)
    if taps is None:
        taps = torch.ones(x.shape[1], 1, 1, dtype=dtype, device=x.device)
    small = (mean, var, taps, bias, center_weight, scale_weight, scale_bias)
    mean, var, *parameters = (None if value is None else value.to(dtype) for value in small)
    return _UBNFunction.apply(
        x, image_mean, mean, var, from_batch, *parameters, eps, scale_from_input
    )


def _forward(
    x: Tensor,
    image_mean: Tensor,
    mean: Tensor,
    var: Tensor,
    from_batch: Union[bool, Tensor],
    taps: Tensor,
    bias: Optional[Tensor],
    center_weight: Optional[Tensor],
    scale_weight: Optional[Tensor],
    scale_bias: Optional[Tensor],
    eps: float,
    scale_from_input: bool,
) -> Tuple[Tensor, Tensor]:
    """Y and ``1 / sqrt(var + eps)``."""
    rstd = torch.rsqrt(var + eps)
    shift = _shift(image_mean, mean, center_weight)
    pooled = image_mean if scale_from_input else (image_mean + shift) * rstd
    scale = (_factor(pooled, scale_weight, scale_bias) * rstd).expand_as(shift)

    def slice_of_y(part: slice) -> Tensor:
        return _convolve(_rectify(x[part], shift[part], scale[part]), taps, bias)

    # Autocast would send the convolution's float32 operands back to half.
    with torch.autocast(x.device.type, enabled=False):
        return over_batch(x, slice_of_y), rstd


class _UBNFunction(torch.autograd.Function):
    """Forward and hand-written backward of :func:`ubn`."""

    @staticmethod
    def forward(ctx, *arguments):
        x, image_mean, mean, _, from_batch, taps, bias, *rectifiers, _, scale_from_input = arguments
        y, rstd = _forward(*arguments)
        ctx.has_bias = bias is not None
        ctx.from_batch = from_batch  # a bool, or a scalar that nothing changes in place
        ctx.scale_from_input = scale_from_input
        ctx.save_for_backward(x, image_mean, mean, rstd, taps, *rectifiers)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, image_mean, mean, rstd, taps, *rectifiers = ctx.saved_tensors
        center_weight, scale_weight, scale_bias = rectifiers
        batch, _, height, width = x.shape
        shift = _shift(image_mean, mean, center_weight)
        centred = image_mean + shift  # (1 + w_m) m - mu
        pooled = image_mean if ctx.scale_from_input else centred * rstd
        factor = _factor(pooled, scale_weight, scale_bias)
        scale = (factor * rstd).expand_as(shift)

        # First pass over the large tensors: dX_r, what it sums to per image and channel,
        # and the gradients of the affine.
        d_scale = torch.empty_like(shift)
        d_shift = torch.empty_like(shift)
        d_taps = torch.zeros_like(taps)
        d_bias = torch.zeros_like(mean)
        d_x_r = torch.empty_like(x, dtype=taps.dtype)
        with torch.autocast(x.device.type, enabled=False):
            for part in batch_slices(x):
                shifted = x[part] + _plane(shift[part])
                x_r = shifted * _plane(scale[part])
                gradients = _convolve_backward(dy[part].to(taps.dtype), x_r, taps)
                d_x_r[part] = gradients[0]
                d_taps += gradients[1]
                d_bias += gradients[2]
                d_scale[part] = shifted.mul_(gradients[0]).sum((2, 3))
                d_shift[part] = gradients[0].sum((2, 3)) * scale[part]

        # From the shift h and the scale a to the parameters, mu, sigma^2 and m.
        d_rstd = (d_scale * factor).sum(0)
        d_gap = d_center_weight = d_scale_weight = d_scale_bias = None
        if scale_weight is not None:
            d_logit = d_scale * rstd * factor * (1 - factor)
            d_scale_weight = (d_logit * pooled).sum(0)
            d_scale_bias = d_logit.sum(0)
            d_gap = d_logit * scale_weight  # of m through the sigmoid's input
            if not ctx.scale_from_input:
                d_rstd = d_rstd + (d_gap * centred).sum(0)
                d_gap = d_gap * rstd
                d_shift = d_shift + d_gap
        # Statistics of the batch depend on X, running ones do not.
        d_mean = _where(ctx.from_batch, -d_shift.sum(0))
        d_var = _where(ctx.from_batch, -0.5 * rstd**3 * d_rstd)
        d_image_mean = d_mean / batch + d_var * (2 / batch) * centred
        if center_weight is not None:
            d_center_weight = ((d_shift + d_image_mean) * image_mean).sum(0)
            d_image_mean = d_image_mean + center_weight * (d_shift + d_image_mean)
        if d_gap is not None:
            d_image_mean = d_image_mean + d_gap

        # Second pass: X through X_r, through the variance inside each image (centred on
        # m) and through m.
        slope = (d_var * (2 / (batch * height * width))).expand_as(shift)
        level = d_image_mean / (height * width)
        for part in batch_slices(x):
            through_statistics = _rectify(x[part], -image_mean[part], slope[part])
            d_x_r[part] *= _plane(scale[part])
            d_x_r[part] += through_statistics.add_(_plane(level[part]))
        dx = d_x_r.to(x.dtype)
        d_parameters = d_center_weight, d_scale_weight, d_scale_bias
        d_affine = d_taps, d_bias if ctx.has_bias else None
        return dx, *[None] * 4, *d_affine, *d_parameters, None, None


def _shift(image_mean: Tensor, mean: Tensor, center_weight: Optional[Tensor]) -> Tensor:
    """h, (N, C)."""
    if center_weight is None:
        return -mean.expand_as(image_mean)
    return center_weight * image_mean - mean


def _factor(
    pooled: Tensor, scale_weight: Optional[Tensor], scale_bias: Optional[Tensor]
) -> Union[Tensor, float]:
    """g, (N, C), or 1 where the scaling is not calibrated."""
    return 1.0 if scale_weight is None else torch.sigmoid(scale_weight * pooled + scale_bias)


def _where(condition: Union[bool, Tensor], value: Tensor) -> Tensor:
    """``value`` or zeros, chosen on the device."""
    if isinstance(condition, Tensor):
        return torch.where(condition, value, 0.0)
    return value if condition else torch.zeros_like(value)


def _rectify(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``scale * (x + shift)`` with (N, C) coefficients, in their dtype."""
    return (x + _plane(shift)).mul_(_plane(scale))


def _convolve(x: Tensor, taps: Tensor, bias: Optional[Tensor] = None) -> Tensor:
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


def _plane(value: Tensor) -> Tensor:
    """(N, C) coefficients, ready to meet an (N, C, H, W) tensor."""
    return value[..., None, None]

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

from typing import Any, NamedTuple, Optional, Tuple, Union

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

from . import backend as backends
from .utils import statistics_dtype


class Statistics(NamedTuple):
    """What normalises, and how it depends on the batch."""

    mean: Tensor
    r""":math:`\mu`, (C,), without gradient."""

    var: Tensor
    r""":math:`\sigma^2`, biased, (C,), without gradient."""

    from_batch: Union[bool, Tensor] = False
    """Whether they are those of the batch and so depend on X; a bool or a scalar bool
    tensor, which is not read back to the host."""

    count: Optional[Tensor] = None
    """Scalar, the number of values a channel behind them; None is N H W of this X."""

    group: Optional[Any] = None
    """Process group whose batches they are together; None is this process alone."""


@torch.no_grad()
def image_moments(x: Tensor, backend: str = 'auto') -> Tuple[Tensor, Tensor]:
    """Mean and biased variance over H and W of every image and channel, without gradient.

    The variance is taken from centred values: E[x^2] - E[x]^2 cancels where the
    mean is large.

    Args:
        x (Tensor): (N, C, H, W), any float dtype and memory format.
        backend (str): ``'auto'``, ``'torch'`` or ``'triton'``.

    Returns:
        tuple[Tensor, Tensor]: Two of shape (N, C), float32 (float64 for float64
        input).
    """
    return backends.choose(backend, x).image_moments(x)


@torch.no_grad()
def image_mean(x: Tensor, backend: str = 'auto') -> Tensor:
    """Mean over H and W of every image and channel, as in :func:`image_moments`."""
    return backends.choose(backend, x).image_mean(x)


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
    statistics: Statistics,
    taps: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
    center_weight: Optional[Tensor] = None,
    scale_weight: Optional[Tensor] = None,
    scale_bias: Optional[Tensor] = None,
    eps: float = 1e-5,
    scale_from_input: bool = False,
    backend: str = 'auto',
) -> Tensor:
    r"""Centering, normalization, scaling and affine of UBN (Eqs. 4 and 5), with its own backward.

    ``image_mean`` and ``statistics`` come in as plain numbers; their dependence on
    ``x`` and ``center_weight`` is part of this function's backward. Where they are
    those of a process group, backward sums their gradients over it, in one collective
    of 2 C numbers.

    Args:
        x (Tensor): X, (N, C, H, W), any float dtype and memory format; N may be 0.
        image_mean (Tensor): m, (N, C), of :func:`image_moments`.
        statistics (Statistics): :math:`\mu` and :math:`\sigma^2`, and whether they are the
            :func:`batch_statistics` of ``x``.
        taps (Tensor, optional): K, the effective kernel of the affine, (C, k, k)
            with odd k. Default: no affine.
        bias (Tensor, optional): :math:`\beta`, (C,).
        center_weight (Tensor, optional): :math:`w_m`, (C,).
        scale_weight (Tensor, optional): :math:`w_v`, (C,), together with
        scale_bias (Tensor, optional): :math:`w_b`, (C,).
        eps (float): :math:`\epsilon`.
        scale_from_input (bool): Whether the sigmoid sees m in place of t, as in IEBN.
        backend (str): ``'auto'``, ``'torch'`` or ``'triton'``, see
            :func:`mmubn.ops.backend.choose`.

    Returns:
        Tensor: Y, (N, C, H, W), in the dtype and memory format of ``x``.

    Raises:
        RuntimeError: On double backward, which is not implemented; where ``'triton'``
            cannot be had.
    """
    dtype = statistics_dtype(x.dtype)
    if taps is None:
        taps = torch.ones(x.shape[1], 1, 1, dtype=dtype, device=x.device)
    passes = backends.choose(backend, x, taps.shape[-1])
    mean, var, *how = statistics
    small = (mean, var, taps, bias, center_weight, scale_weight, scale_bias)
    small = (None if value is None else value.to(dtype) for value in small)
    return _UBNFunction.apply(x, image_mean, *small, how, eps, scale_from_input, passes)


class _UBNFunction(torch.autograd.Function):
    """Forward and hand-written backward of :func:`ubn`."""

    @staticmethod
    def forward(ctx, x, image_mean, mean, var, taps, bias, *rest):
        *rectifiers, how, eps, scale_from_input, passes = rest
        center_weight, scale_weight, scale_bias = rectifiers
        rstd = torch.rsqrt(var + eps)
        shift = _shift(image_mean, mean, center_weight)
        pooled = image_mean if scale_from_input else (image_mean + shift) * rstd
        scale = (_factor(pooled, scale_weight, scale_bias) * rstd).expand_as(shift)
        ctx.has_bias = bias is not None
        ctx.how = how  # a bool and scalars that nothing changes in place
        ctx.scale_from_input = scale_from_input
        ctx.passes = passes
        # Where the planes are so small that m would weigh, backward takes it from X again.
        kept_mean = None if _weighs(image_mean, x) else image_mean
        ctx.save_for_backward(x, kept_mean, mean, rstd, taps, *rectifiers)
        return passes.forward(x, shift, scale, taps, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, image_mean, mean, rstd, taps, *rectifiers = ctx.saved_tensors
        if image_mean is None:
            image_mean = ctx.passes.image_mean(x)
        center_weight, scale_weight, scale_bias = rectifiers
        from_batch, count, group = ctx.how
        batch, _, height, width = x.shape
        count = batch * height * width if count is None else count
        shift = _shift(image_mean, mean, center_weight)
        centred = image_mean + shift  # (1 + w_m) m - mu
        pooled = image_mean if ctx.scale_from_input else centred * rstd
        factor = _factor(pooled, scale_weight, scale_bias)
        scale = (factor * rstd).expand_as(shift)

        d_scale, d_shift, d_taps, d_bias, d_x_r = ctx.passes.backward_sums(
            x, dy, shift, scale, taps
        )
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
        d_statistics = torch.stack([-d_shift.sum(0), -0.5 * rstd**3 * d_rstd])
        if group is not None:
            distributed.all_reduce(d_statistics, group=group)
        d_mean, d_var = _where(from_batch, d_statistics) / count
        d_image_mean = (d_mean + 2 * d_var * centred) * (height * width)
        if center_weight is not None:
            d_center_weight = ((d_shift + d_image_mean) * image_mean).sum(0)
            d_image_mean = d_image_mean + center_weight * (d_shift + d_image_mean)
        if d_gap is not None:
            d_image_mean = d_image_mean + d_gap

        # X through X_r, through the variance inside each image (centred on m) and through m.
        slope = (2 * d_var).expand_as(shift)
        level = d_image_mean / (height * width)
        dx = ctx.passes.backward_input(x, dy, image_mean, scale, slope, level, taps, d_x_r)
        d_parameters = d_center_weight, d_scale_weight, d_scale_bias
        d_affine = d_taps, d_bias if ctx.has_bias else None
        return dx, *[None] * 3, *d_affine, *d_parameters, *[None] * 4


def _weighs(image_mean: Tensor, x: Tensor) -> bool:
    """Whether m has more than 2 % of the bytes of X."""
    plane_bytes = x.shape[2] * x.shape[3] * x.element_size()
    return 50 * image_mean.element_size() > plane_bytes


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

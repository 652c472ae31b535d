r"""What a rectified norm layer is in evaluation, once all that is constant is folded.

Symbols and shapes as in :mod:`mmubn.ops.ubn`: X the input, (N, C, H, W); m its mean over H
and W, (N, C); :math:`\mu, \sigma^2` the running statistics, :math:`w_m, w_v, w_b` the
calibrations, :math:`\gamma, \beta` and K the affine, all per channel. With
:math:`r = 1 / \sqrt{\sigma^2 + \epsilon}` evaluation is

.. math::
    t &= r \, ((1 + w_m) m - \mu), \qquad g = \mathrm{sigmoid}(w_v t + w_b) \\
    Y &= \mathrm{dwconv}_k(g r \, (X + w_m m - \mu);\, \gamma K) + \beta .

Let the layer be given :math:`V = s X + e` in place of X, with s and e per channel, which the
convolution before it makes for nothing, and let p be the mean of V over H and W. Then

.. math::
    Y &= \mathrm{dwconv}_k(g \, (V - q);\, T) + \beta, \qquad T = \gamma K r / s \\
    q &= d - w_m p, \qquad d = (1 + w_m) e + s \mu \\
    g &= \mathrm{sigmoid}(a p + b), \qquad
         a = w_v (1 + w_m) r / s, \quad b = w_b - w_v d \, r / s .

IEBN, whose sigmoid sees m, has :math:`a = w_v / s, b = w_b - w_v e / s`. With
:math:`e = -s \mu / (1 + w_m)` there is no d. Where every :math:`w_m` is 0 there is no q left
then; where every :math:`w_v` is 0, g is a constant and goes into T; and where K has its middle
tap alone, :math:`s = \gamma K r` makes T one, so that convolution goes.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import IEBN
from ..ops import Buffers, Parameters, Settings
from ..ops import backend as backends
from ..ops.interface import Backend
from ..ops.utils import tracing


@dataclass(frozen=True)
class Constants:
    r"""What a layer computes with, float64; None is what it does without.

    :math:`Y = \mathrm{dwconv}_k(g (V - q); T) + \beta` with
    :math:`q = \text{shift\_weight} \, p + \text{shift\_bias}` and
    :math:`g = \mathrm{sigmoid}(\text{scale\_weight} \, p + \text{scale\_bias})`.
    """

    taps: Tensor  # T, (C, k, k)
    bias: Optional[Tensor]  # beta, (C,)
    shift_weight: Optional[Tensor]  # -w_m, (C,)
    shift_bias: Optional[Tensor]  # d, (C,)
    scale_weight: Optional[Tensor]  # a, (C,)
    scale_bias: Optional[Tensor]  # b, (C,)

    @property
    def per_image(self) -> bool:
        """Whether anything depends on the image."""
        return self.shift_weight is not None or self.scale_weight is not None

    @property
    def kernel_size(self) -> int:
        """Side of the taps, k."""
        return self.taps.shape[-1]


class Fold(NamedTuple):
    """V = scale * X + offset, float64, (C,) each."""

    scale: Tensor  # s
    offset: Tensor  # e


@torch.no_grad()
def constants_of(norm: nn.Module) -> Constants:
    """The constants of a layer on its own input: s = 1 and e = 0.

    Args:
        norm (nn.Module): A rectified layer or a BatchNorm2d, with running statistics.

    Returns:
        Constants: Without the calibrations that are zero in all channels, and without the
        taps beside the middle where those are.
    """

    def read(name: str) -> Optional[Tensor]:
        value = getattr(norm, name, None)
        return None if value is None else value.double()

    mean, rstd = norm.running_mean.double(), _rstd(norm)
    taps = rstd[:, None, None]
    if norm.weight is not None:
        taps = taps * norm.weight.double()[:, None, None]
    if read('kernel') is not None:
        taps = taps * _without_idle_taps(read('kernel').squeeze(1))
    center_weight = _unless_zero(read('center_weight'))
    scale_weight, scale_bias = _unless_zero(read('scale_weight')), read('scale_bias')
    if scale_weight is None and scale_bias is not None:
        taps, scale_bias = taps * torch.sigmoid(scale_bias)[:, None, None], None
    if scale_weight is not None and not isinstance(norm, IEBN):
        scale_weight = scale_weight * rstd
        scale_bias = scale_bias - scale_weight * mean
        if center_weight is not None:
            scale_weight = scale_weight * (1 + center_weight)
    return Constants(
        taps=taps,
        bias=_unless_zero(read('bias')),
        shift_weight=None if center_weight is None else -center_weight,
        shift_bias=_unless_zero(mean),
        scale_weight=scale_weight,
        scale_bias=scale_bias,
    )


@torch.no_grad()
def fold(norm: nn.Module) -> Tuple[Fold, Optional[Constants]]:
    r"""Splits a layer into what the convolution before it can do and the rest.

    Args:
        norm (nn.Module): As in :func:`constants_of`.

    Returns:
        tuple[Fold, Constants | None]: What the convolution is to give, and the constants on
        that; None where nothing is left to do.
    """
    c = constants_of(norm)
    mean = norm.running_mean.double()
    scale = _rstd(norm) if c.kernel_size > 1 else c.taps[:, 0, 0]
    # s is 0 where gamma is. X has no way into Y there, and nothing may be divided by s.
    inverse = torch.where(scale.abs() > _TINY, 1 / scale, 0.0)
    offset, shift_bias = -scale * mean, None
    if c.shift_weight is not None:
        # With e / (1 + w_m) no d is left; but where 1 + w_m is about 0, digits would cancel.
        gain = 1 - c.shift_weight
        safe = gain.abs() > 0.5
        offset = torch.where(safe, offset / gain, offset)
        shift_bias = _unless_zero(torch.where(safe, 0.0, gain * offset + scale * mean))
    if c.kernel_size == 1 and not c.per_image:
        return Fold(scale, offset if c.bias is None else offset + c.bias), None
    rest = replace(c, taps=c.taps * inverse[:, None, None], shift_bias=shift_bias)
    if c.kernel_size == 1:
        rest = replace(rest, taps=torch.ones_like(c.taps))
    if c.scale_weight is not None:  # a m + b of X is this of V, as m = (p - e) / s
        weight = c.scale_weight * inverse
        rest = replace(rest, scale_weight=weight, scale_bias=c.scale_bias - weight * offset)
    return Fold(scale, offset), rest


class InferenceNorm(nn.Module):
    r"""A norm layer prepared for inference.

    .. math::
        Y = \mathrm{dwconv}_k(g \, (V - q);\, T) + \beta

    as in :class:`Constants`, which are buffers here and move with ``.to()``.

    Args:
        constants (Constants): What to compute with.
        dtype (torch.dtype): Of the constants.
        owns_input (bool): Whether nothing but this layer reads its input. It writes into it
            then, unless autograd follows.

    Shape:
        - Input: V, (N, C, H, W). Output: the same.
    """

    def __init__(self, constants: Constants, dtype: torch.dtype, owns_input: bool) -> None:
        super().__init__()
        self.owns_input = owns_input
        self.affine: Optional[nn.Conv2d] = None
        taps, bias = constants.taps, constants.bias
        if constants.kernel_size > 1:
            self.affine, bias = depthwise(constants, dtype), None
        one = constants.kernel_size > 1 or bool((taps == 1).all())
        for name, value, shape in (
            ('shift_weight', constants.shift_weight, (-1, 1, 1, 1)),  # a depthwise kernel
            ('shift_bias', constants.shift_bias, (-1,)),
            ('scale_weight', constants.scale_weight, (-1, 1, 1, 1)),
            ('scale_bias', constants.scale_bias, (-1,)),
            ('weight', None if one else taps, (1, -1, 1, 1)),
            ('bias', bias, (1, -1, 1, 1)),
        ):
            self.register_buffer(name, None if value is None else value.to(dtype).view(shape))
        # What says to a backend that mu is in the offset and sigma^2 is 1.
        like = taps.new_ones(len(taps), dtype=dtype)
        self.register_buffer('_ones', like, persistent=False)
        self.register_buffer('_zeros', torch.zeros_like(like), persistent=False)

    def forward(self, input: Tensor) -> Tensor:  # BatchNorm's name, which some give
        v = input
        # A backend's convolution is faster than torch's; what is left otherwise is made in place.
        if self.affine is not None and not tracing() and v.numel() and not v.requires_grad:
            backend = backends.choose('auto', v, self.affine.kernel_size[0])
            if backend is not backends.TORCH:
                return self._by(backend, v)
        in_place = self.owns_input and not v.requires_grad
        pooled = _pool(v)
        factor, shift = self.weight, self.shift_bias
        if self.scale_weight is not None:
            factor = torch.sigmoid(_per_channel(pooled, self.scale_weight, self.scale_bias))
            factor = factor if self.weight is None else factor * self.weight
        if self.shift_weight is not None:
            shift = _per_channel(pooled, self.shift_weight, self.shift_bias)
        elif shift is not None:
            shift = shift.view(1, -1, 1, 1)
        # A subtraction: onnxruntime would make an addition in its blocked format, slowly.
        if shift is not None:
            v = v.sub_(shift) if in_place else v - shift
        if factor is not None:
            v = v.mul_(factor) if in_place else v * factor
        if self.affine is not None:
            return self.affine(v)
        if self.bias is None:
            return v
        return v.add_(self.bias) if in_place else v + self.bias

    @torch.no_grad()
    def _by(self, backend: Backend, v: Tensor) -> Tensor:
        """In one call of a backend's own code: as a step of UBN in evaluation."""

        def channels(value: Optional[Tensor]) -> Optional[Tensor]:
            return None if value is None else value.view(-1)

        parameters = Parameters(
            weight=self._ones if self.weight is None else channels(self.weight),
            kernel=self.affine.weight,
            bias=self.affine.bias,
            center_weight=None if self.shift_weight is None else -channels(self.shift_weight),
            scale_weight=channels(self.scale_weight),
            scale_bias=channels(self.scale_bias),
        )
        mean = self._zeros if self.shift_bias is None else self.shift_bias
        settings = Settings(eps=0.0, training=False, scale_from_input=True)
        return backend.normalize(v, None, None, parameters, Buffers(mean, self._ones), settings)[0]

    def extra_repr(self) -> str:
        """What is computed of each image."""
        offset = None if self.shift_weight is None else 'offset'
        factor = None if self.scale_weight is None else 'factor'
        return ', '.join(filter(None, (offset, factor)))


def depthwise(constants: Constants, dtype: torch.dtype) -> nn.Conv2d:
    """The depthwise convolution with T and beta."""
    channels, size = len(constants.taps), constants.kernel_size
    conv = nn.utils.skip_init(  # initial values would move the random generator
        nn.Conv2d,
        channels,
        channels,
        size,
        padding=size // 2,
        groups=channels,
        bias=constants.bias is not None,
        device=constants.taps.device,
        dtype=dtype,
    ).requires_grad_(False)
    conv.weight.copy_(constants.taps[:, None])
    if constants.bias is not None:
        conv.bias.copy_(constants.bias)
    return conv.eval()


def _to_onnx() -> bool:
    return tracing() and torch.onnx.is_in_onnx_export()


def _pool(v: Tensor) -> Tensor:
    """Mean over H and W, (N, C, 1, 1)."""
    if _to_onnx() and not torch.jit.is_tracing() and hasattr(torch.onnx, 'ops'):
        # The newer exporter would write ReduceMean, for which onnxruntime leaves its format.
        return torch.onnx.ops.symbolic(
            'GlobalAveragePool', (v,), dtype=v.dtype, shape=(*v.shape[:2], 1, 1)
        )
    return F.adaptive_avg_pool2d(v, 1)


def _per_channel(pooled: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    """``weight * pooled + bias`` of (N, C, 1, 1), with a weight of (C, 1, 1, 1)."""
    if _to_onnx():
        # One node in place of two, which runtimes fuse with the sigmoid. Torch is slow at it.
        return F.conv2d(pooled, weight, bias, groups=weight.shape[0])
    weight = weight.transpose(0, 1)
    return pooled * weight if bias is None else torch.addcmul(bias.view_as(weight), pooled, weight)


# A scale below it counts as 0: float32 has no reciprocal of it worth the name.
_TINY = 1e-30


def _rstd(norm: nn.Module) -> Tensor:
    return torch.rsqrt(norm.running_var.double() + float(norm.eps))


def _unless_zero(value: Optional[Tensor]) -> Optional[Tensor]:
    return value if value is not None and value.any() else None


def _without_idle_taps(kernel: Tensor) -> Tensor:
    """K, (C, k, k), or its middle, (C, 1, 1), where the other taps are zero."""
    middle = kernel.shape[-1] // 2
    middle_tap = kernel[:, middle : middle + 1, middle : middle + 1]
    return middle_tap if kernel.count_nonzero() == middle_tap.count_nonzero() else kernel

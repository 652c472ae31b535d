r"""What a rectified norm layer is in evaluation, once all that is constant is folded.

Symbols and shapes as in :mod:`mmubn.ops.interface`: X the input, (N, C, H, W); m its mean over H
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

from ..layers.leaf import Leaf
from ..ops import Buffers, Parameters, Settings
from ..ops import backend as backends
from ..ops.interface import Backend
from ..ops.utils import tracing


@dataclass(frozen=True)
class Constants:
    r"""What a layer computes with, float64; None is what it does without.

    :math:`Y = \mathrm{dwconv}_k(g (V - q); T) + \beta` with
    :math:`q = \text{shift} - \text{center\_weight} \, p` and
    :math:`g = \mathrm{sigmoid}(\text{scale\_weight} \, p + \text{scale\_bias})`.
    """

    taps: Tensor  # T, (C, k, k)
    bias: Optional[Tensor]  # beta, (C,)
    center_weight: Optional[Tensor]  # w_m, (C,)
    shift: Optional[Tensor]  # d, (C,)
    scale_weight: Optional[Tensor]  # a, (C,)
    scale_bias: Optional[Tensor]  # b, (C,)

    @property
    def per_image(self) -> bool:
        """Whether anything depends on the image."""
        return self.center_weight is not None or self.scale_weight is not None

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
    if scale_weight is not None and not norm._scale_from_input:
        scale_weight = scale_weight * rstd
        scale_bias = scale_bias - scale_weight * mean
        if center_weight is not None:
            scale_weight = scale_weight * (1 + center_weight)
    return Constants(
        taps=taps,
        bias=_unless_zero(read('bias')),
        center_weight=center_weight,
        shift=_unless_zero(mean),
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
    rstd, middle = _rstd(norm), c.taps[:, 0, 0]
    # The convolution takes a 1 x 1 affine too, unless gamma is so small that what an image adds,
    # which is divided by it, would leave the range of float16.
    small = (middle.abs() > _TINY) & (middle.abs() < 2**-10 * rstd)
    whole = c.kernel_size == 1 and not (c.per_image and bool(small.any()))
    scale = middle if whole else rstd
    # s is 0 where gamma is. X has no way into Y there, and nothing may be divided by s.
    inverse = torch.where(scale.abs() > _TINY, 1 / scale, 0.0)
    offset, shift = -scale * mean, None
    if c.center_weight is not None:
        # With e / (1 + w_m) no d is left; but where 1 + w_m is about 0, digits would cancel.
        gain = 1 + c.center_weight
        safe = gain.abs() > 0.5
        offset = torch.where(safe, offset / gain, offset)
        shift = _unless_zero(torch.where(safe, 0.0, gain * offset + scale * mean))
    if c.kernel_size == 1 and not c.per_image:
        return Fold(scale, offset if c.bias is None else offset + c.bias), None
    rest = replace(c, taps=c.taps * inverse[:, None, None], shift=shift)
    if whole:
        rest = replace(rest, taps=torch.ones_like(c.taps))
    if c.scale_weight is not None:  # a m + b of X is this of V, as m = (p - e) / s
        weight = c.scale_weight * inverse
        rest = replace(rest, scale_weight=weight, scale_bias=c.scale_bias - weight * offset)
    return Fold(scale, offset), rest


class InferenceNorm(Leaf, nn.Module):
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

    Raises:
        ValueError: The input is not 4D or has another number of channels.
    """

    def __init__(self, constants: Constants, dtype: torch.dtype, owns_input: bool) -> None:
        super().__init__()
        self.owns_input = owns_input
        self.affine: Optional[DepthwiseConv2d] = None
        taps, bias = constants.taps, constants.bias
        if constants.kernel_size > 1:
            self.affine, bias = DepthwiseConv2d(constants, dtype), None
        one = constants.kernel_size > 1 or bool((taps == 1).all())
        for name, value in (
            ('center_weight', constants.center_weight),
            ('shift', constants.shift),
            ('scale_weight', constants.scale_weight),
            ('scale_bias', constants.scale_bias),
            ('weight', None if one else taps.view(-1)),
            ('bias', bias),
        ):
            # A copy: in float64 a constant may be a parameter of the layer, which is guarded.
            self.register_buffer(name, None if value is None else value.to(dtype, copy=True))
        _add_neutral(self, taps, dtype)

    def forward(self, input: Tensor) -> Tensor:  # BatchNorm's name, which some give
        v, affine = input, self.affine
        _check_input(v, self._ones)
        in_place = self.owns_input and not v.requires_grad
        # Without a convolution, a large image is better changed in place, by torch.
        aside = affine is None and in_place and v.numel() >= _LARGE
        backend = None if aside else _backend(v, affine)
        if backend is not None:
            weight, kernel, bias = self.weight, None, self.bias
            if affine is not None:
                kernel, bias = affine.weight, affine.bias
            parameters = Parameters(
                self._ones if weight is None else weight,
                kernel,
                bias,
                self.center_weight,
                self.scale_weight,
                self.scale_bias,
            )
            return _evaluate(backend, v, parameters, self.shift, self)
        pooled = _pool(v)
        shift, factor = self.shift, self.weight
        if self.center_weight is not None:
            shift = _per_channel(pooled, -self.center_weight, shift)
        if self.scale_weight is not None:
            factor = torch.sigmoid(_per_channel(pooled, self.scale_weight, self.scale_bias))
            factor = factor if self.weight is None else factor * _channels(self.weight)
        # A subtraction: onnxruntime would make an addition in its blocked format, slowly.
        if shift is not None:
            v = v.sub_(_channels(shift)) if in_place else v - _channels(shift)
        if factor is not None:
            v = v.mul_(_channels(factor)) if in_place else v * _channels(factor)
        if affine is not None:
            return affine(v)
        if self.bias is None:
            return v
        return v.add_(_channels(self.bias)) if in_place else v + _channels(self.bias)

    def extra_repr(self) -> str:
        """What is computed of each image."""
        offset = None if self.center_weight is None else 'offset'
        factor = None if self.scale_weight is None else 'factor'
        return ', '.join(filter(None, (offset, factor)))


class DepthwiseConv2d(Leaf, nn.Conv2d):
    """The depthwise convolution with T and beta, by a backend's own code where there is one.

    Args:
        constants (Constants): T and beta among them.
        dtype (torch.dtype): Of weight and bias.

    Raises:
        ValueError: The input is not 4D or has another number of channels.
    """

    def __init__(self, constants: Constants, dtype: torch.dtype) -> None:
        channels, size = len(constants.taps), constants.kernel_size
        # Initial values, which are none on meta, would move the random generator.
        super().__init__(
            channels,
            channels,
            size,
            padding=size // 2,
            groups=channels,
            bias=constants.bias is not None,
            device='meta',
            dtype=dtype,
        )
        self.to_empty(device=constants.taps.device).requires_grad_(False).eval()
        with torch.no_grad():
            self.weight.copy_(constants.taps[:, None])
            if constants.bias is not None:
                self.bias.copy_(constants.bias)
        _add_neutral(self, constants.taps, dtype)

    def forward(self, input: Tensor) -> Tensor:
        _check_input(input, self._ones)
        backend = _backend(input, self)
        if backend is None:
            if not (tracing() or input.numel()):  # torch refuses planes without rows
                return input.clone()
            return super().forward(input)
        parameters = Parameters(self._ones, self.weight, self.bias)
        return _evaluate(backend, input, parameters, None, self)


def _add_neutral(module: nn.Module, taps: Tensor, dtype: torch.dtype) -> None:
    """What says to a backend that mu is in the offset, sigma^2 is 1, and gamma in the taps."""
    ones = taps.new_ones(len(taps), dtype=dtype)
    module.register_buffer('_ones', ones, persistent=False)
    module.register_buffer('_zeros', torch.zeros_like(ones), persistent=False)


def _check_input(v: Tensor, ones: Tensor) -> None:
    """Raises a ValueError on a wrong shape: the backends read what they are given."""
    if torch.jit.is_tracing():  # which would warn of each look at a shape
        return
    if v.dim() != 4 or v.shape[1] != len(ones):
        raise ValueError(f'expected an input of shape (N, {len(ones)}, H, W), got {tuple(v.shape)}')


def _backend(v: Tensor, affine: Optional[nn.Conv2d]) -> Optional[Backend]:
    """The backend whose own code can serve, which torch's operations are slower than."""
    if tracing() or not v.numel() or v.requires_grad:
        return None
    if affine is not None and affine.weight.requires_grad:
        return None
    backend = backends.choose('auto', v, 1 if affine is None else affine.kernel_size[0])
    return None if backend is backends.TORCH else backend


# Numbers in a tensor from which on new memory costs more than a few calls of torch.
_LARGE = 1 << 20
# eps=0 with a variance of 1, and the sigmoid sees the mean of the input, as constants want it.
_EVALUATION = Settings(eps=0.0, training=False, scale_from_input=True)


def _evaluate(
    backend: Backend,
    v: Tensor,
    parameters: Parameters,
    shift: Optional[Tensor],
    module: nn.Module,
) -> Tensor:
    """One call of a backend, as a step of UBN in evaluation."""
    running = Buffers(module._zeros if shift is None else shift, module._ones)
    return backend.normalize(v, None, None, parameters, running, _EVALUATION)[0]


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


def _channels(value: Tensor) -> Tensor:
    """(C,), or (N, C, 1, 1) as it is, against (N, C, H, W)."""
    return value.view(-1, 1, 1) if value.dim() == 1 else value


def _per_channel(pooled: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    """``weight * pooled + bias`` of (N, C, 1, 1), with (C,) each."""
    if _to_onnx():
        # One node in place of two, which runtimes fuse with the sigmoid. Torch is slow at it.
        return F.conv2d(pooled, weight.view(-1, 1, 1, 1), bias, groups=len(weight))
    weight = _channels(weight)
    return pooled * weight if bias is None else torch.addcmul(_channels(bias), pooled, weight)


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

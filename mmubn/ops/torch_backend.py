"""A step in plain torch: any device, any float dtype, any k.

On the CPU each pass over the large tensors works in cache-sized slices of the batch, as a
fresh temporary of X's size costs more there than its arithmetic. Without autograd's Function
around it, :meth:`TorchBackend.measure` and :meth:`TorchBackend.normalize` are made of
differentiable operations alone, which is what export, tracing and torch.func see.

Symbols as in :mod:`mmubn.ops.interface`; coefficients per image and channel are (N, C).
"""

from contextlib import nullcontext
from typing import Callable, ContextManager, List, NamedTuple, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from .interface import Backend, Buffers, Parameters, Settings, Sums
from .utils import differentiable, statistics_dtype

# What one step of a loop over the batch may hold on the CPU: about the second
# level cache, beyond which a fresh temporary costs more than its arithmetic.
_CHUNK_BYTES = 2 << 20


class _Coefficients(NamedTuple):
    """The collapsed stage 2."""

    shift: Tensor
    """h, (N, C)."""

    pooled: Tensor
    """What the sigmoid sees, (N, C)."""

    factor: Union[Tensor, float]
    """g, (N, C), or 1 where the scaling is not calibrated."""

    scale: Tensor
    """a, (N, C)."""


class _PixelSums(NamedTuple):
    """Sums over pixels, before the algebra."""

    d_scale: Tensor
    """(N, C), sum over H and W of (X + h) dX_r."""

    d_shift: Tensor
    """(N, C), a times the sum over H and W of dX_r."""

    d_taps: Tensor
    """(C, k, k)."""

    d_bias: Tensor
    """(C,)."""

    d_x_r: Tensor
    """(N, C, H, W)."""


class _Rest(NamedTuple):
    """What the second backward pass finds again."""

    image_mean: Tensor
    centred: Tensor  # (1 + w_m) m - mu
    scale: Tensor
    d_shift: Tensor
    d_gap: Optional[Tensor]  # of m through the sigmoid's input
    d_x_r: Tensor


class TorchBackend(Backend):
    """The backend in plain torch."""

    name = 'torch'

    def why_not(self, x: Tensor, kernel_size: int) -> str:
        """It always serves."""
        return ''

    def measure(
        self, x: Tensor, center_weight: Optional[Tensor], stride: int
    ) -> Tuple[Tensor, Tensor]:
        """See :meth:`mmubn.ops.interface.Backend.measure`."""
        image_mean, image_var = _image_moments(x)
        of_x_c = image_mean
        if center_weight is not None:
            of_x_c = image_mean * (1 + center_weight.to(image_mean.dtype))
        var, mean = torch.var_mean(of_x_c, dim=0, correction=0)
        var = var + image_var.mean(0)
        count = mean.new_full((1,), x.numel() // x.shape[1])
        return image_mean, torch.cat(
            [count, self._pairs(x, image_mean, image_var, stride), mean, var]
        )

    @torch.no_grad()
    def _pairs(self, x: Tensor, image_mean: Tensor, image_var: Tensor, stride: int) -> Tensor:
        """Number of pairs of images and their mean similarity, (2,)."""
        if not stride:
            return image_mean.new_zeros(2)
        if stride > 1:
            return similarity_of_pairs(x[:, :, ::stride, ::stride], self)
        pixels = x.shape[2] * x.shape[3]
        squared_norm = pixels * (image_var + image_mean.square()).sum(1)
        return similarity_of_pairs(x, self, squared_norm)

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
        dtype = statistics_dtype(x.dtype)
        parameters = _as(parameters, dtype)
        if settings.training:
            mean, var, share = _statistics(rows, buffers, settings)
        else:
            mean, var = buffers.running_mean.to(dtype), buffers.running_var.to(dtype)
            share = mean.new_zeros(())
        if image_mean is None and settings.needs_image_mean(parameters):
            image_mean = _image_mean(x)
        rstd = torch.rsqrt(var + settings.eps)
        y = _output(x, image_mean, mean, rstd, parameters, settings)
        return y, image_mean, torch.cat([mean, rstd, share[None]])

    def again(
        self, x: Tensor, statistics: Tensor, parameters: Parameters, settings: Settings
    ) -> Tensor:
        """Y of a step that was made before, as a function to differentiate; moves nothing.

        Args:
            x (Tensor): X.
            statistics (Tensor): Those of :meth:`normalize`; they tell what the gate was.
            parameters (Parameters): Of the layer.
            settings (Settings): Of the step.
        """
        parameters = _as(parameters, statistics.dtype)
        mean, rstd, share = _split(statistics)
        image_mean = None
        if settings.training:
            image_mean, row = self.measure(x, parameters.center_weight, stride=0)
            own_mean, own_var = row[3:].chunk(2)
            mean = torch.where(share > 0, own_mean, mean)
            rstd = torch.where(share > 0, torch.rsqrt(own_var + settings.eps), rstd)
        elif settings.needs_image_mean(parameters):
            image_mean = _image_mean(x)
        return _output(x, image_mean, mean, rstd, parameters, settings)

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
        parameters = _as(parameters, statistics.dtype)
        mean, rstd, _ = _split(statistics)
        if image_mean is None and settings.needs_image_mean(parameters):
            image_mean = _image_mean(x)
        image_mean = _mean_or_zeros(image_mean, x, statistics.dtype)
        shift, pooled, factor, scale = _coefficients(image_mean, mean, rstd, parameters, settings)
        sums = _sum_pixels(x, dy, shift, scale, _taps(x, parameters))
        centred = image_mean + shift
        # From the shift h and the scale a to the parameters, mu, sigma^2 and m.
        d_shift = sums.d_shift
        d_rstd = (sums.d_scale * factor).sum(0)
        d_gap = d_scale_weight = d_scale_bias = None
        if parameters.scale_weight is not None:
            d_logit = sums.d_scale * rstd * factor * (1 - factor)
            d_scale_weight = (d_logit * pooled).sum(0)
            d_scale_bias = d_logit.sum(0)
            d_gap = d_logit * parameters.scale_weight
            if not settings.scale_from_input:
                d_rstd = d_rstd + (d_gap * centred).sum(0)
                d_gap = d_gap * rstd
                d_shift = d_shift + d_gap
        d_weight = d_kernel = None
        if parameters.weight is not None:
            if parameters.kernel is None:
                d_weight = sums.d_taps[:, 0, 0]
            else:
                d_weight = (sums.d_taps * parameters.kernel.squeeze(1)).sum((1, 2))
                d_kernel = (sums.d_taps * parameters.weight[:, None, None])[:, None]
        return Sums(
            d_statistics=torch.stack([-d_shift.sum(0), -0.5 * rstd * (rstd * (rstd * d_rstd))]),
            gradients=Parameters(
                weight=d_weight,
                kernel=d_kernel,
                bias=sums.d_bias,
                scale_weight=d_scale_weight,
                scale_bias=d_scale_bias,
            ),
            rest=_Rest(image_mean, centred, scale, d_shift, d_gap, sums.d_x_r),
        )

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
        parameters = _as(parameters, statistics.dtype)
        share = _split(statistics)[2]
        rest = sums.rest
        pixels = x.shape[2] * x.shape[3]
        # Statistics of the batch depend on X, running ones do not.
        d_mean, d_var = torch.where(share > 0, d_statistics * share, 0.0)
        d_image_mean = (d_mean + 2 * d_var * rest.centred) * pixels
        d_center_weight = None
        if parameters.center_weight is not None:
            through_center = rest.d_shift + d_image_mean
            d_center_weight = (through_center * rest.image_mean).sum(0)
            d_image_mean = d_image_mean + parameters.center_weight * through_center
        if rest.d_gap is not None:
            d_image_mean = d_image_mean + rest.d_gap
        # X through X_r, through the variance inside each image (centred on m) and through m.
        slope = (2 * d_var).expand_as(rest.scale)
        return _input_gradient(x, rest, slope, d_image_mean / pixels), d_center_weight

    def squared_sum(self, x: Tensor, weight: Tensor) -> Tensor:
        """See :meth:`mmubn.ops.interface.Backend.squared_sum`."""
        # The sum does not depend on the order of the coordinates: take that of the memory.
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            x = x.permute(0, 2, 3, 1)
        flat = x.flatten(1)
        # Slices of coordinates, each summed over the whole batch: nothing of size D is kept.
        with _without_autocast(x.device):  # it would send mv to half
            parts = [
                torch.mv(flat[:, part].to(weight.dtype).t(), weight).square().sum()
                for part in _slices(x, flat.shape[1])
            ]
        return torch.stack(parts).sum()


def squared_norms(x: Tensor) -> Tensor:
    """``|| X_n ||^2``, (N,)."""
    flat, dtype = x.flatten(1), statistics_dtype(x.dtype)
    norms = [torch.linalg.vector_norm(flat[p], dim=1, dtype=dtype) for p in _batch_slices(x)]
    return torch.cat(norms).square()


def similarity_of_pairs(
    x: Tensor, backend: Backend, squared_norm: Optional[Tensor] = None
) -> Tensor:
    """Number of pairs of images and their mean similarity; (2,) zeros where there is none."""
    batch = x.shape[0]  # export takes the number of len(x) for a constant
    if batch < 2:
        return x.new_zeros(2, dtype=statistics_dtype(x.dtype))
    if squared_norm is None:
        squared_norm = squared_norms(x)
    similarity = similarity_of_unit_vectors(x, squared_norm, backend)
    pairs = torch.full_like(similarity, batch * (batch - 1))
    return torch.where(similarity.isfinite(), torch.stack([pairs, similarity]), 0.0)


def similarity_of_unit_vectors(x: Tensor, squared_norm: Tensor, backend: Backend) -> Tensor:
    """What :func:`mmubn.ops.mean_cosine_similarity` gives, of two features and more."""
    batch = x.shape[0]
    nonzero = squared_norm > 0
    inverse_norm = torch.where(nonzero, squared_norm, 1.0).rsqrt() * nonzero
    total = backend.squared_sum(x, inverse_norm)
    similarity = (total - nonzero.sum()) / (batch * (batch - 1))
    return torch.where(squared_norm.isfinite().all(), similarity, float('nan'))


def _image_mean(x: Tensor) -> Tensor:
    """m, (N, C), in the dtype of the statistics."""
    dtype = statistics_dtype(x.dtype)
    return torch.cat([x[part].mean((2, 3), dtype=dtype) for part in _batch_slices(x)])


def _image_moments(x: Tensor) -> Tuple[Tensor, Tensor]:
    """The image means m and variances v, (N, C) each."""
    mean = _image_mean(x)
    parts = []
    for part in _batch_slices(x):
        centred = x[part] - _plane(mean[part])
        if differentiable():  # the norm of a constant plane has no second derivative
            parts.append(centred.square().sum((2, 3)))
        else:
            parts.append(torch.linalg.vector_norm(centred, dim=(2, 3)).square())
    return mean, torch.cat(parts) / (x.shape[2] * x.shape[3])


def _as(parameters: Parameters, dtype: torch.dtype) -> Parameters:
    return Parameters(*[None if value is None else value.to(dtype) for value in parameters])


def _split(statistics: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """mu, r and the weight of a value in mu."""
    channels = len(statistics) // 2
    return statistics[:channels], statistics[channels:-1], statistics[-1]


def _mean_or_zeros(image_mean: Optional[Tensor], x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_zeros(x.shape[:2], dtype=dtype) if image_mean is None else image_mean


def _taps(x: Tensor, parameters: Parameters) -> Tensor:
    """K, (C, k, k)."""
    if parameters.weight is None:
        return x.new_ones(x.shape[1], 1, 1, dtype=statistics_dtype(x.dtype))
    weight = parameters.weight[:, None, None]
    return weight if parameters.kernel is None else weight * parameters.kernel.squeeze(1)


def _coefficients(
    image_mean: Tensor, mean: Tensor, rstd: Tensor, parameters: Parameters, settings: Settings
) -> _Coefficients:
    if parameters.center_weight is None:
        shift = -mean.expand_as(image_mean)
    else:
        shift = parameters.center_weight * image_mean - mean
    pooled = image_mean if settings.scale_from_input else (image_mean + shift) * rstd
    factor: Union[Tensor, float] = 1.0
    if parameters.scale_weight is not None:
        factor = torch.sigmoid(parameters.scale_weight * pooled + parameters.scale_bias)
    return _Coefficients(shift, pooled, factor, (factor * rstd).expand_as(shift))


def _statistics(
    rows: Tensor, buffers: Buffers, settings: Settings
) -> Tuple[Tensor, Tensor, Tensor]:
    """mu, sigma^2 and the weight of a value in mu; moves the buffers."""
    channels = (rows.shape[1] - 3) // 2
    count, pairs, similarity = rows[:, :3].detach().unbind(1)
    means, variances = rows[:, 3:].split(channels, dim=1)
    total = count.sum()
    weight = (count / total.clamp(min=1))[:, None]
    mean = (weight * means).sum(0)
    var = (weight * (variances + (means - mean).square())).sum(0)
    share = 1 / total.clamp(min=1)
    gated = settings.fct is not None
    with torch.no_grad():  # and detached, as a trace does not hold the one
        gate = _gate(pairs, similarity, buffers, settings) if gated else None
        if settings.update and buffers.running_mean is not None:
            # One value has no unbiased variance, none has no mean.
            allowed = (total > 1) if gate is None else (total > 1) & gate
            unbiased = var.detach() * (total / (total - 1))
            _move(buffers, mean.detach(), unbiased, allowed, settings.momentum)
    if gated:
        mean = torch.where(gate, mean, buffers.running_mean.to(mean.dtype))
        var = torch.where(gate, var, buffers.running_var.to(var.dtype))
        share = torch.where(gate, share, 0.0)
    return mean, var, share


def _gate(pairs: Tensor, similarity: Tensor, buffers: Buffers, settings: Settings) -> Tensor:
    """Scalar bool tensor: whether this step normalises with the statistics of the batch."""
    if not settings.update:
        return buffers.gate.clone()
    tau = buffers.running_similarity
    newest = ((pairs * similarity).sum() / pairs.sum()).to(tau.dtype)
    # Undefined for N = 1, NaN for a NaN image: neither may enter.
    tau.lerp_(torch.where(newest.isfinite(), newest, tau), settings.similarity_weight)
    buffers.gate.copy_((tau > settings.fct) | (buffers.num_batches_tracked < settings.warmup))
    return buffers.gate.clone()


def _move(
    buffers: Buffers, mean: Tensor, unbiased: Tensor, allowed: Tensor, momentum: Optional[float]
) -> None:
    """Moves the running statistics where ``allowed``, unless the batch's are not finite."""
    update = mean.isfinite().all() & unbiased.isfinite().all() & allowed
    buffers.num_batches_tracked.add_(update)
    if momentum is None:  # cumulative average
        momentum = 1 / buffers.num_batches_tracked.clamp(min=1).to(buffers.running_mean.dtype)
    for running, new in ((buffers.running_mean, mean), (buffers.running_var, unbiased)):
        moved = torch.lerp(running, new.to(running.dtype), momentum)
        running.copy_(torch.where(update, moved, running))


def _output(
    x: Tensor,
    image_mean: Optional[Tensor],
    mean: Tensor,
    rstd: Tensor,
    parameters: Parameters,
    settings: Settings,
) -> Tensor:
    """Stage 2: Y from the statistics and m."""
    image_mean = _mean_or_zeros(image_mean, x, mean.dtype)
    shift, _, _, scale = _coefficients(image_mean, mean, rstd, parameters, settings)
    taps = _taps(x, parameters)

    def slice_of_y(part: slice) -> Tensor:
        return _convolve(_rectify(x[part], shift[part], scale[part]), taps, parameters.bias)

    # Autocast would send the convolution's float32 operands back to half.
    with _without_autocast(x.device):
        return _over_batch(x, slice_of_y)


def _rectify(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``scale * (x + shift)`` with (N, C) coefficients, in their dtype."""
    if differentiable():
        return (x + _plane(shift)) * _plane(scale)
    return (x + _plane(shift)).mul_(_plane(scale))


def _convolve(x: Tensor, taps: Tensor, bias: Optional[Tensor]) -> Tensor:
    if taps.shape[-1] == 1:
        weight = taps.view(1, -1, 1, 1)
        return x * weight if bias is None else torch.addcmul(bias.view(1, -1, 1, 1), x, weight)
    padding = int(taps.shape[-1]) // 2  # torch 2.4 and older trace a size as a tensor
    return F.conv2d(x, taps[:, None], bias, padding=padding, groups=int(taps.shape[0]))


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


def _sum_pixels(x: Tensor, dy: Tensor, shift: Tensor, scale: Tensor, taps: Tensor) -> _PixelSums:
    """First backward pass: everything that is a sum over X's pixels, and dX_r."""
    d_scale = torch.empty_like(shift)
    d_shift = torch.empty_like(shift)
    d_taps = torch.zeros_like(taps)
    d_bias = torch.zeros_like(taps[:, 0, 0])
    d_x_r = torch.empty_like(x, dtype=taps.dtype)
    with _without_autocast(x.device):
        for part in _batch_slices(x):
            shifted = x[part] + _plane(shift[part])
            x_r = shifted * _plane(scale[part])
            gradients = _convolve_backward(dy[part].to(taps.dtype), x_r, taps)
            d_x_r[part] = gradients[0]
            d_taps += gradients[1]
            d_bias += gradients[2]
            d_scale[part] = shifted.mul_(gradients[0]).sum((2, 3))
            d_shift[part] = gradients[0].sum((2, 3)) * scale[part]
    return _PixelSums(d_scale, d_shift, d_taps, d_bias, d_x_r)


def _input_gradient(x: Tensor, rest: _Rest, slope: Tensor, level: Tensor) -> Tensor:
    """Second backward pass: ``dX = a dX_r + slope (X - m) + level``; writes into dX_r."""
    d_x_r = rest.d_x_r
    for part in _batch_slices(x):
        through_statistics = _rectify(x[part], -rest.image_mean[part], slope[part])
        d_x_r[part] *= _plane(rest.scale[part])
        d_x_r[part] += through_statistics.add_(_plane(level[part]))
    return d_x_r.to(x.dtype)


def _without_autocast(device: torch.device) -> ContextManager:
    """In which autocast sends no operand to half; tensors on ``meta`` know no autocast."""
    return nullcontext() if device.type == 'meta' else torch.autocast(device.type, enabled=False)


def _batch_slices(x: Tensor) -> List[slice]:
    """Slices of the first dimension: cache-sized in eager mode on the CPU, else a single one."""
    return _slices(x, x.shape[0])


def _slices(x: Tensor, length: int) -> List[slice]:
    """Slices of a dimension of ``x``, of that length, as :func:`_batch_slices`."""
    if x.device.type != 'cpu' or differentiable() or not x.numel():
        return [slice(None)]
    item_bytes = x.numel() // length * statistics_dtype(x.dtype).itemsize
    step = max(1, _CHUNK_BYTES // item_bytes)
    return [slice(start, start + step) for start in range(0, length, step)]


def _over_batch(x: Tensor, function: Callable[[slice], Tensor]) -> Tensor:
    """What ``function`` makes of each slice of the batch, as one tensor like ``x``."""
    parts = _batch_slices(x)
    if len(parts) == 1:
        result = function(parts[0])
        # torch.compile loses the gradient of a Function's output that another tensor
        # of its forward aliases, which a cast to the same dtype or an in-place last
        # operation would make.
        return result if result.dtype == x.dtype else result.to(x.dtype)
    result = torch.empty_like(x)
    for part in parts:
        result[part] = function(part)
    return result


def _plane(value: Tensor) -> Tensor:
    """(N, C) coefficients, ready to meet an (N, C, H, W) tensor."""
    return value[..., None, None]

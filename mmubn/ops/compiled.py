"""A step as one operator of torch, which torch.compile calls and does not look into.

What a compiler makes of the torch backend keeps twice BatchNorm's bytes, as it saves what the
backward pass would make anew, and is slower on the CPU than the backends' own code. So a compiled
network runs the same backend as an eager one. The operators are functional, as those with an
autograd formula must be: they return what the buffers become, and :func:`step` copies it.
"""

from typing import List, Optional, Tuple

import torch
from torch import Tensor

from . import backend as backends
from .interface import Buffers, Parameters, Settings
from .step import Step, keeps, step_backward, step_forward
from .utils import statistics_dtype

# torch 2.4 and newer.
available = hasattr(torch.library, 'custom_op')
# Export, whose graph may hold no operator of ours, is told from compilation since torch 2.7;
# before, evaluation is left to torch's own operations.
_tells_export = hasattr(torch.compiler, '_is_exporting_flag')


def serves(settings: Settings) -> bool:
    """Whether the operators can stand in what is being compiled or exported."""
    if not available:
        return False
    if not _tells_export:
        return settings.training
    # Not is_exporting(), which torch.compile folds into True.
    return not torch.compiler._is_exporting_flag


def loses(buffers: Buffers) -> bool:
    """Whether a compiled graph would forget what the step does to the buffers.

    It does so with scalars of float64 on the CPU (seen with torch 2.11, whatever its backend).
    """
    tau = buffers.running_similarity
    return tau is not None and tau.dtype == torch.float64 and tau.device.type == 'cpu'


def step(
    x: Tensor, parameters: Parameters, buffers: Buffers, settings: Settings, backend: str
) -> Tensor:
    """:func:`mmubn.ops.ubn` of one process."""
    # No _replace(), which torch 2.4 does not compile.
    given = [
        _float(value) if name in ('momentum', 'fct') else value
        for name, value in zip(Settings._fields, settings)
    ]
    y, _, _, moved = torch.ops.mmubn.step(x, *parameters, *buffers, *given, backend)
    if settings.training:
        with torch.no_grad():
            for buffer, value in zip([b for b in buffers if b is not None], moved):
                buffer.copy_(value)
    return y


def _float(value: Optional[float]) -> Optional[float]:
    return None if value is None else float(value)


def _none(value: Tensor) -> Optional[Tensor]:
    return value if value.numel() else None


def _some(value: Optional[Tensor], like: Tensor) -> Tensor:
    return like.new_empty(0) if value is None else value


if available:

    @torch.library.custom_op('mmubn::step', mutates_args=())
    def _step(
        x: Tensor,
        weight: Optional[Tensor],
        kernel: Optional[Tensor],
        bias: Optional[Tensor],
        center_weight: Optional[Tensor],
        scale_weight: Optional[Tensor],
        scale_bias: Optional[Tensor],
        running_mean: Optional[Tensor],
        running_var: Optional[Tensor],
        num_batches_tracked: Optional[Tensor],
        running_similarity: Optional[Tensor],
        gate: Optional[Tensor],
        steps: Optional[Tensor],
        eps: float,
        training: bool,
        momentum: Optional[float],
        fct: Optional[float],
        similarity_weight: float,
        interval: int,
        stride: int,
        warmup: int,
        update: bool,
        scale_from_input: bool,
        backend: str,
    ) -> Tuple[Tensor, Tensor, Tensor, List[Tensor]]:
        parameters = Parameters(weight, kernel, bias, center_weight, scale_weight, scale_bias)
        given = running_mean, running_var, num_batches_tracked, running_similarity, gate, steps
        settings = Settings(
            eps,
            training,
            momentum,
            fct,
            similarity_weight,
            interval,
            stride,
            warmup,
            update,
            scale_from_input,
        )
        moved = Buffers(*[None if value is None else value.clone() for value in given])
        chosen = backends.choose(backend, x, parameters.kernel_size)
        y, image_mean, statistics = step_forward(
            x, parameters, Step(chosen, moved, settings, group=None)
        )
        kept = image_mean if keeps(image_mean, x) else None
        return (
            y,
            _some(kept, statistics),
            statistics,
            [value for value in moved if value is not None],
        )

    @_step.register_fake
    def _(x, *rest):
        parameters, given, settings = Parameters(*rest[:6]), rest[6:12], Settings(*rest[12:-1])
        dtype = statistics_dtype(x.dtype)
        mean = x.new_empty(x.shape[:2], dtype=dtype)
        known = settings.needs_image_mean(parameters) and keeps(mean, x)
        return (
            torch.empty_like(x if _is_dense(x) else x.contiguous()),
            mean if known else mean.new_empty(0),
            x.new_empty(2 * x.shape[1] + 1, dtype=dtype),
            [torch.empty_like(value) for value in given if value is not None],
        )

    def _is_dense(x: Tensor) -> bool:
        return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)

    @torch.library.custom_op('mmubn::step_backward', mutates_args=())
    def _step_backward(
        dy: Tensor,
        x: Tensor,
        image_mean: Tensor,
        statistics: Tensor,
        weight: Optional[Tensor],
        kernel: Optional[Tensor],
        center_weight: Optional[Tensor],
        scale_weight: Optional[Tensor],
        scale_bias: Optional[Tensor],
        eps: float,
        training: bool,
        scale_from_input: bool,
        backend: str,
    ) -> List[Tensor]:
        parameters = Parameters(weight, kernel, None, center_weight, scale_weight, scale_bias)
        settings = Settings(eps=eps, training=training, scale_from_input=scale_from_input)
        chosen = backends.choose(backend, x, parameters.kernel_size)
        dx, gradients = step_backward(
            x, dy, _none(image_mean), statistics, parameters, Step(chosen, Buffers(), settings)
        )
        return [dx, *[value for value in gradients if value is not None]]

    @_step_backward.register_fake
    def _(dy, x, image_mean, statistics, *rest):
        weight, kernel, center_weight, scale_weight, scale_bias = rest[:5]
        bias = statistics.new_empty(x.shape[1])
        parameters = weight, kernel, bias, center_weight, scale_weight, scale_bias
        dx = torch.empty_like(x if _is_dense(x) else x.contiguous())
        return [
            dx,
            *[torch.empty_like(v, dtype=statistics.dtype) for v in parameters if v is not None],
        ]

    def _setup_context(ctx, inputs, output) -> None:
        x, weight, kernel, bias, *rectifiers = inputs[:7]
        _, image_mean, statistics, _ = output
        ctx.save_for_backward(x, image_mean, statistics, weight, kernel, *rectifiers)
        ctx.has_bias = bias is not None
        ctx.count = len(inputs)
        settings = Settings(*inputs[13:-1])
        ctx.rest = settings.eps, settings.training, settings.scale_from_input, inputs[-1]

    def _backward(ctx, dy, *ignored):
        x, image_mean, statistics, *parameters = ctx.saved_tensors
        dx, *found = torch.ops.mmubn.step_backward(
            dy, x, image_mean, statistics, *parameters, *ctx.rest
        )
        weight, kernel, *rectifiers = [None if value is None else value for value in parameters]
        gradients = []
        for value in (weight, kernel, statistics, *rectifiers):  # there is always one of the bias
            gradients.append(None if value is None else found.pop(0))
        if not ctx.has_bias:
            gradients[2] = None
        return (dx, *gradients, *[None] * (ctx.count - 7))

    _step.register_autograd(_backward, setup_context=_setup_context)

"""A step of UBN and its kin: one plan for every backend, and what autograd sees of it."""

from typing import Any, Optional, Tuple

import torch
from torch import Tensor

from . import backend as backends
from . import compiled
from .interface import Buffers, Parameters, Settings
from .step import Step, an_image, keeps, step_backward, step_forward
from .utils import (
    checkpointed_selectively,
    compiling,
    differentiable,
    is_batched,
    is_wrapped,
    tracing,
    unseen,
    vmap_levels,
)


def ubn(
    x: Tensor,
    parameters: Parameters,
    buffers: Buffers,
    settings: Settings,
    group: Optional[Any] = None,
    backend: str = 'auto',
) -> Tensor:
    r"""Condensation threshold, centering, normalization, scaling and affine (Eqs. 3 to 5).

    .. math::
        \tau &\leftarrow (1 - \alpha) \tau + \alpha s \\
        \mu, \sigma^2 &= \text{those of the batch if } \tau > \mathrm{FCT}
            \text{ else the running ones} \\
        Y &= \mathrm{dwconv}_k(a \, (X + h);\, \gamma \odot K) + \beta

    with the symbols of :mod:`mmubn.ops.interface`. The dependence of :math:`\mu` and
    :math:`\sigma^2` on X is part of the backward pass. Under ``create_graph=True``, transforms
    of torch.func, forward mode, tracing and export plain torch does the work; torch.compile
    calls the backend as one operator, ``mmubn::step``.

    Shapes, dtypes and devices are not checked, and compiled code reads memory by them. The
    layers check them first.

    Args:
        x (Tensor): X, (N, C, H, W), any float dtype and memory format; N may be 0.
        parameters (Parameters): What the layer learns.
        buffers (Buffers): What it remembers, moved in place by a training step.
        settings (Settings): What this step does.
        group (ProcessGroup, optional): Takes statistics and similarity over its processes:
            an ``all_gather`` of 2 C + 3 numbers forward, an ``all_reduce`` of 2 C backward.
            Default: this process alone.
        backend (str): See :func:`mmubn.ops.backend.choose`.

    Returns:
        Tensor: Y, (N, C, H, W), in the dtype and memory format of ``x``.

    Raises:
        RuntimeError: With a ``group``, on double backward, torch.func, forward mode, batched
            gradients and traces, which are not implemented; where the backend cannot be had;
            where a CUDA graph is captured with an interval above 1; where ``vmap`` would move
            running statistics that its members share.
        ValueError: There is no backend of that name.
        MemoryError: The C++ finds no memory for its sums.
    """
    if compiling() and (x.numel() or group is not None):
        # For collectives, for torch older than 2.4, which knows no operators, and for what loses()
        # says.
        if group is not None or not compiled.available or compiled.loses(buffers):
            from .not_compiled import ubn_not_compiled

            return ubn_not_compiled(x, parameters, buffers, settings, group, backend)
        if compiled.serves(settings):
            return compiled.step(x, parameters, buffers, settings, backend)
    traced = tracing()
    if not traced and checkpointed_selectively():
        with unseen():  # a step that is run again measures and moves nothing
            return ubn(x, parameters, buffers, settings, group, backend)
    x = x.resolve_neg()  # a lazy minus sign, which kernels would not see
    chosen = backends.choose(backend, x if x.numel() else an_image(x), parameters.kernel_size)
    step = Step(chosen, buffers, settings, group)
    if traced:
        _refuse_processes(group)  # a collective has no derivative
        if settings.update:
            _refuse_vmap(x, buffers.running_mean)
        tau = buffers.running_similarity
        if tau is not None and is_wrapped(tau):
            step = step._replace(buffers=_of_transform(buffers))
        return step_forward(x, parameters, step)[0]
    wanted = (x, *parameters)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in wanted):
        return _UBNFunction.apply(x, *parameters, step)
    with torch.no_grad():
        return step_forward(x, parameters, step)[0]


def _of_transform(buffers: Buffers) -> Buffers:
    """The buffers inside a transform of torch.func, which moves nothing but what it was given.

    The gate and the count of steps are none of its arguments, as they are no buffers of the layer.
    """
    gate = torch.ones_like(buffers.running_similarity, dtype=torch.bool)  # ends with the call
    steps = buffers.steps
    if steps is not None:
        steps = steps.clone()
        with torch._C._DisableFuncTorch():
            buffers.steps.add_(1)
    return buffers._replace(gate=gate, steps=steps)


class _UBNFunction(torch.autograd.Function):
    """Forward and hand-written backward of :func:`ubn`."""

    @staticmethod
    def forward(
        ctx, x, weight, kernel, bias, center_weight, scale_weight, scale_bias, step
    ) -> Tensor:
        parameters = Parameters(weight, kernel, bias, center_weight, scale_weight, scale_bias)
        y, image_mean, statistics = step_forward(x, parameters, step)
        ctx.step = step
        ctx.has_bias = bias is not None
        kept = image_mean if keeps(image_mean, x) else None
        # The bias is not kept: its gradient does not need it.
        ctx.save_for_backward(
            x, kept, statistics, weight, kernel, None, center_weight, scale_weight, scale_bias
        )
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tuple[Optional[Tensor], ...]:
        if differentiable() or is_batched(dy):
            # create_graph=True, or a dY that vmap or is_grads_batched=True batched
            dx, gradients = _differentiable_backward(ctx, dy)
        else:
            x, image_mean, statistics, *parameters = ctx.saved_tensors
            dx, gradients = step_backward(
                x, dy.resolve_neg(), image_mean, statistics, Parameters(*parameters), ctx.step
            )
        if not ctx.has_bias:
            gradients = gradients._replace(bias=None)
        return (dx, *gradients, None)  # none of the step


def _differentiable_backward(ctx, dy: Tensor) -> Tuple[Tensor, Parameters]:
    """As :func:`.step.step_backward`, by autograd: gradients that can be differentiated in turn."""
    x, _, statistics, *parameters = ctx.saved_tensors
    _, _, settings, group = ctx.step
    _refuse_processes(group)
    names = [name for name, value in zip(Parameters._fields, parameters) if value is not None]

    def y(x: Tensor, *values: Tensor) -> Tensor:
        given = Parameters(**dict(zip(names, values)))
        return backends.TORCH.again(x, statistics, given, settings)

    # Not autograd.grad: X may itself depend on a parameter, by an earlier call of the layer.
    values = [value for value in parameters if value is not None]
    dx, *gradients = torch.func.vjp(y, x, *values)[1](dy)
    return dx, Parameters(**dict(zip(names, gradients)), bias=dy.sum((0, 2, 3)))


def _refuse_processes(group: Optional[Any]) -> None:
    if group is not None:
        raise RuntimeError(
            'no gradient of a gradient (create_graph=True), torch.func, forward mode, batched '
            'gradient or trace through statistics of several processes: use UBN in place of '
            'SyncUBN there'
        )


def _refuse_vmap(x: Tensor, running_mean: Optional[Tensor]) -> None:
    if running_mean is not None and vmap_levels(x) - vmap_levels(running_mean):
        raise RuntimeError(
            'vmap over a training step, as for per-sample gradients, cannot move the running '
            'statistics that its members share: call model.eval(), or take them out by '
            'torch.func.replace_all_batch_norm_modules_(model)'
        )

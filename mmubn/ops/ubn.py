"""A step of UBN and its kin: one plan for every backend, and what autograd sees of it."""

from typing import Any, NamedTuple, Optional, Tuple, Union

import torch
from torch import Tensor, distributed

from . import backend as backends
from .interface import Backend, Buffers, Parameters, Settings
from .utils import differentiable, tracing


class Step(NamedTuple):
    """One call of a layer, but for X and the parameters."""

    backend: Backend
    buffers: Buffers
    settings: Settings
    group: Optional[Any] = None


class _Gradients(NamedTuple):
    """One for each argument of :meth:`_UBNFunction.forward`."""

    x: Tensor
    weight: Optional[Tensor]
    kernel: Optional[Tensor]
    bias: Optional[Tensor]
    center_weight: Optional[Tensor]
    scale_weight: Optional[Tensor]
    scale_bias: Optional[Tensor]
    step: None = None


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
    of torch.func, forward mode, tracing, compilation and export plain torch does the work.

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
        RuntimeError: On double backward with a ``group``, which is not implemented; where
            the backend cannot be had.
        ValueError: There is no backend of that name.
    """
    chosen = backends.choose(backend, x, parameters.kernel_size)
    step = Step(chosen, buffers, settings, group)
    wanted = (x, *parameters)
    graph = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in wanted)
    if tracing():
        return _forward(x, parameters, step)[0]
    if not graph:
        with torch.no_grad():
            return _forward(x, parameters, step)[0]
    return _UBNFunction.apply(x, *parameters, step)


def _forward(
    x: Tensor, parameters: Parameters, step: Step
) -> Tuple[Tensor, Optional[Tensor], Tensor]:
    """Y, m and the statistics."""
    backend, buffers, settings, group = step
    if not settings.training:
        return backend.normalize(x, None, None, parameters, buffers, settings)
    due = _is_due(buffers, settings)
    stride = settings.stride if due is not False else 0
    image_mean, row = backend.measure(x, parameters.center_weight, stride)
    if isinstance(due, Tensor):  # without pairs there is no similarity
        count, pairs, rest = row.split([1, 2, len(row) - 3])
        row = torch.cat([count, torch.where(due, pairs, 0.0), rest])
    rows = row[None] if group is None else _all_gather(row, group)
    return backend.normalize(x, image_mean, rows, parameters, buffers, settings)


def _is_due(buffers: Buffers, settings: Settings) -> Union[bool, Tensor]:
    """Whether this step measures the similarity.

    A tensor where the step is written down, as a branch would be compiled or traced for each
    number of steps. The similarity is then computed in every step and used in those.
    """
    if settings.fct is None or not settings.update:
        return False
    if buffers.steps is None:
        return True
    due = buffers.steps % settings.interval == 0  # on the CPU
    buffers.steps.add_(1)
    return due if tracing() else bool(due)


class _UBNFunction(torch.autograd.Function):
    """Forward and hand-written backward of :func:`ubn`."""

    @staticmethod
    def forward(
        ctx, x, weight, kernel, bias, center_weight, scale_weight, scale_bias, step
    ) -> Tensor:
        parameters = Parameters(weight, kernel, bias, center_weight, scale_weight, scale_bias)
        y, image_mean, statistics = _forward(x, parameters, step)
        ctx.step = step
        # Where the planes are so small that m would weigh, backward takes it from X again.
        kept = None if image_mean is None or _weighs(image_mean, x) else image_mean
        ctx.has_bias = bias is not None
        ctx.save_for_backward(x, kept, statistics, *parameters._replace(bias=None))
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> _Gradients:
        if differentiable() or torch._C._functorch.is_legacy_batchedtensor(dy):
            # create_graph=True, or a dY that vmap or is_grads_batched=True batched
            return _differentiable_backward(ctx, dy)
        x, image_mean, statistics, *parameters = ctx.saved_tensors
        parameters = Parameters(*parameters)
        backend, _, settings, group = ctx.step
        sums = backend.backward_sums(x, dy, image_mean, statistics, parameters, settings)
        d_statistics = sums.d_statistics
        if group is not None:
            distributed.all_reduce(d_statistics, group=group)
        dx, d_center_weight = backend.backward_input(
            x, dy, statistics, d_statistics, parameters, settings, sums
        )
        gradients = sums.gradients._replace(
            bias=sums.gradients.bias if ctx.has_bias else None, center_weight=d_center_weight
        )
        return _Gradients(dx, *gradients)


def _differentiable_backward(ctx, dy: Tensor) -> _Gradients:
    """The gradients by autograd, which can be differentiated in turn."""
    x, _, statistics, *parameters = ctx.saved_tensors
    _, _, settings, group = ctx.step
    if group is not None:
        raise RuntimeError(
            'no gradient of a gradient (create_graph=True) through statistics of several '
            'processes: use UBN in place of SyncUBN there'
        )
    names = [name for name, value in zip(Parameters._fields, parameters) if value is not None]

    def y(x: Tensor, *values: Tensor) -> Tensor:
        given = Parameters(**dict(zip(names, values)))
        return backends.TORCH.again(x, statistics, given, settings)

    # Not autograd.grad: X may itself depend on a parameter, by an earlier call of the layer.
    values = [value for value in parameters if value is not None]
    dx, *gradients = torch.func.vjp(y, x, *values)[1](dy)
    gradients = Parameters(**dict(zip(names, gradients)))
    return _Gradients(dx, *gradients._replace(bias=dy.sum((0, 2, 3)) if ctx.has_bias else None))


def _weighs(image_mean: Tensor, x: Tensor) -> bool:
    """Whether m has more than 2 % of the bytes of X."""
    plane_bytes = x.shape[2] * x.shape[3] * x.element_size()
    return 50 * image_mean.element_size() > plane_bytes


def _all_gather(row: Tensor, group: Any) -> Tensor:
    """The rows of all ranks, (R, K)."""
    rows = row.new_empty(distributed.get_world_size(group), len(row))
    if distributed.get_backend(group) == 'gloo':  # torch 2.1's has no all_gather_into_tensor
        distributed.all_gather(list(rows), row, group)
    else:
        distributed.all_gather_into_tensor(rows, row, group)
    return rows

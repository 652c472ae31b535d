"""The order of a step, forward and backward, whatever makes its parts."""

from typing import Any, NamedTuple, Optional, Tuple, Union

import torch
from torch import Tensor, distributed

from .interface import Backend, Buffers, Parameters, Settings
from .utils import tracing


class Step(NamedTuple):
    """One call of a layer, but for X and the parameters."""

    backend: Backend
    buffers: Buffers
    settings: Settings
    group: Optional[Any] = None


def step_forward(
    x: Tensor, parameters: Parameters, step: Step
) -> Tuple[Tensor, Optional[Tensor], Tensor]:
    """Y, m and the statistics, see :meth:`mmubn.ops.interface.Backend.normalize`."""
    backend, buffers, settings, group = step
    if not settings.training:
        return backend.normalize(x, None, None, parameters, buffers, settings)
    due = _is_due(buffers, settings)
    if not x.numel():
        return _forward_without_images(x, parameters, step)
    stride = settings.stride if due is not False else 0
    if group is None and not isinstance(due, Tensor):
        return backend.forward(x, stride, parameters, buffers, settings)
    image_mean, row = backend.measure(x, parameters.center_weight, stride)
    if isinstance(due, Tensor):  # without pairs there is no similarity
        count, pairs, rest = row.split([1, 2, len(row) - 3])
        row = torch.cat([count, torch.where(due, pairs, 0.0), rest])
    rows = row[None] if group is None else _all_gather(row, group)
    return backend.normalize(x, image_mean, rows, parameters, buffers, settings)


def step_backward(
    x: Tensor,
    dy: Tensor,
    image_mean: Optional[Tensor],
    statistics: Tensor,
    parameters: Parameters,
    step: Step,
) -> Tuple[Tensor, Parameters]:
    """Gradients of X and of the parameters; there is always one of the bias."""
    backend, _, settings, group = step
    if not x.numel():
        return _backward_without_images(x, statistics, parameters, group)
    if group is None:
        return backend.backward(x, dy, image_mean, statistics, parameters, settings)
    sums = backend.backward_sums(x, dy, image_mean, statistics, parameters, settings)
    distributed.all_reduce(sums.d_statistics, group=group)
    dx, d_center_weight = backend.backward_input(
        x, statistics, sums.d_statistics, parameters, settings, sums
    )
    return dx, sums.gradients._replace(center_weight=d_center_weight)


def an_image(x: Tensor) -> Tensor:
    """A single zero, of the dtype and device of an empty ``x``, for what takes no empty one."""
    return x.new_zeros(1, x.shape[1], 1, 1)


def _forward_without_images(
    x: Tensor, parameters: Parameters, step: Step
) -> Tuple[Tensor, Optional[Tensor], Tensor]:
    """Joins the collective of the other processes and moves the buffers by the same code as they.

    So that the buffers stay equal bit for bit.
    """
    backend, buffers, settings, group = step
    image = an_image(x)
    image_mean, row = backend.measure(image, parameters.center_weight, stride=0)
    row.zero_()
    rows = row[None] if group is None else _all_gather(row, group)
    statistics = backend.normalize(image, image_mean, rows, parameters, buffers, settings)[2]
    return torch.empty_like(x), None, statistics


def _backward_without_images(
    x: Tensor, statistics: Tensor, parameters: Parameters, group: Optional[Any]
) -> Tuple[Tensor, Parameters]:
    if group is not None:
        distributed.all_reduce(statistics.new_zeros(2, x.shape[1]), group=group)
    gradients = [None if value is None else torch.zeros_like(value) for value in parameters]
    gradients = Parameters(*gradients)._replace(bias=statistics.new_zeros(x.shape[1]))
    return torch.zeros_like(x), gradients


def _is_due(buffers: Buffers, settings: Settings) -> Union[bool, Tensor]:
    """Whether this step measures the similarity.

    A tensor where the step is written down, as a branch would be compiled or traced for each
    number of steps. The similarity is then computed in every step and used in those.
    """
    if settings.fct is None or not settings.update:
        return False
    if buffers.steps is None:
        return True
    if buffers.running_similarity.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            'a CUDA graph repeats what the captured step decides: set fct_interval=1, with which '
            'every step measures'
        )
    number = buffers.steps.clone() if tracing() else int(buffers.steps)  # on the CPU
    buffers.steps.add_(1)
    return number % settings.interval == 0


def keeps(image_mean: Optional[Tensor], x: Tensor) -> bool:
    """Whether m is kept for the backward pass: not where it has over 2 % of the bytes of X.

    Planes are so small there that taking it from X again costs little.
    """
    if image_mean is None:
        return False
    plane_bytes = x.shape[2] * x.shape[3] * x.element_size()
    return 50 * image_mean.element_size() <= plane_bytes


def _all_gather(row: Tensor, group: Any) -> Tensor:
    """The rows of all ranks, (R, K)."""
    rows = row.new_empty(distributed.get_world_size(group), len(row))
    if distributed.get_backend(group) == 'gloo':  # torch 2.1's has no all_gather_into_tensor
        distributed.all_gather(list(rows), row, group)
    else:
        distributed.all_gather_into_tensor(rows, row, group)
    return rows

"""mmcv's compiled operators, computed by those that torchvision ships compiled.

Lies beside an mmcv without operators as ``mmcv/_ext.py``, where mmcv's loader looks. Python
takes an extension module before a source file of the same name, so a compiled ``mmcv._ext``
wins wherever there is one.

The signatures are those of mmcv's pybind.cpp: a result goes into a tensor that the caller
made, in the caller's dtype and memory format. float16 and bfloat16 are computed in float32,
as torchvision does under autocast. What is not served raises NotImplementedError when called.
"""

import functools
import math
import warnings
from importlib import metadata
from typing import List

import mmcv
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

_tv = torch.ops.torchvision

TESTED = ('2.1.0', '2.3.6')  # releases of mmcv whose operators have these signatures
SERVED = {}  # operator of mmcv -> what computes it


def _serves(by: str):
    """Lists the operator, and keeps torch.compile out of it.

    Dynamo stops at a compiled operator. Through a Python one it would trace mmcv's
    autograd.Function, and lose the gradients that are written in place.
    """

    def decorate(function):
        SERVED[function.__name__] = by
        return torch.compiler.disable(function)

    return decorate


def _release() -> str:
    """What pip calls the installed mmcv with operators, ``NAME==VERSION``."""
    try:
        return f'onedl-mmcv=={metadata.version("onedl-mmcv")}'
    except metadata.PackageNotFoundError:
        return f'mmcv=={mmcv.__version__}'


def _refuse(name: str, *args, **kwargs):
    raise NotImplementedError(
        f"{name}: this mmcv has no compiled operators, and torchvision has none that equals mmcv's "
        'here. To compile them: `pip install --no-cache-dir --no-build-isolation --no-deps '
        f'--force-reinstall {_release()}` (in a checkout of mmubn: `make env OPS=1`)'
    )


def __getattr__(name: str):  # mmcv's loader asks with hasattr
    if name.startswith('__'):
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return functools.partial(_refuse, name)


def get_compiler_version() -> str:
    return 'none, torchvision stands in'


def get_compiling_cuda_version() -> str:
    return f'none, torchvision {torchvision.__version__} stands in'


def _wide(*tensors: Tensor) -> List[Tensor]:
    """float16 and bfloat16 as float32."""
    return [x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for x in tensors]


@_serves('torchvision.ops.nms')
def nms(boxes, scores, iou_threshold, offset):
    boxes, scores = _wide(boxes, scores)
    # mmcv compares in the dtype of the boxes, torchvision would in float64.
    iou_threshold = torch.tensor(iou_threshold, dtype=boxes.dtype).item()
    # mmcv's order where scores are equal: torchvision sees ranks, which never are.
    order = scores.argsort(descending=True)
    boxes = boxes[order] + boxes.new_tensor([0, 0, offset, offset])
    rank = torch.arange(len(boxes), 0, -1, device=boxes.device).to(boxes.dtype)
    return order[_tv.nms(boxes, rank, iou_threshold)]


@_serves('NumPy')
def softnms(boxes, scores, dets, iou_threshold, sigma, min_score, method, offset):
    boxes, scores = (x.detach().numpy().copy() for x in _wide(boxes, scores))
    areas = (boxes[:, 2:] - boxes[:, :2] + offset).prod(1)
    left, kept, rows = np.arange(len(boxes)), [], []
    while len(left):
        best = scores[left].argmax()
        top = left[best]
        kept.append(top)
        rows.append([*boxes[top], scores[top]])
        left[best] = left[0]  # mmcv swaps, which decides between equal scores later
        left = left[1:]
        sides = np.minimum(boxes[left, 2:], boxes[top, 2:])
        sides = sides - np.maximum(boxes[left, :2], boxes[top, :2]) + offset
        common = sides.clip(0).prod(1)
        union = areas[top] + areas[left] - common
        iou = common / np.where(union > 0, union, 1)  # boxes without area have none in common
        if method == 2:  # gaussian
            scores[left] *= np.exp(-(iou * iou) / sigma)
        else:  # linear, or naive, which drops the box
            scores[left] *= np.where(iou >= iou_threshold, 1 - iou if method == 1 else 0, 1)
        alive = ~(scores[left] < min_score)
        stay = np.arange(alive.sum())  # a hole takes the last box that is left, as in mmcv
        stay[~alive[: len(stay)]] = np.flatnonzero(alive[len(stay) :])[::-1] + len(stay)
        left = left[stay]
    dets[: len(rows)] = torch.tensor(np.array(rows).reshape(-1, 5), dtype=dets.dtype)
    return torch.tensor(kept, dtype=torch.long)


def _check_rois(rois: Tensor, aligned: bool) -> None:
    """Raises where mmcv does on a CPU: torchvision would read beyond its memory."""
    if rois.device.type != 'cpu' or _is_written_down():
        return
    sound = rois.isfinite().all()
    if aligned:
        sound &= (rois[:, 3:] >= rois[:, 1:3]).all()
    if not sound:
        raise RuntimeError(
            'RoIAlign: the boxes must be finite and, with aligned=True, have x1 <= x2 and '
            'y1 <= y2; NaN comes from a training that diverged'
        )


def _is_written_down() -> bool:
    """By torch.export or a tracer, where no branch may look at the boxes."""
    exporting = getattr(torch.compiler, 'is_compiling', lambda: False)()
    return exporting or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0


@_serves('torchvision.ops.roi_align')
def roi_align_forward(
    input,
    rois,
    output,
    argmax_y,
    argmax_x,
    aligned_height,
    aligned_width,
    spatial_scale,
    sampling_ratio,
    pool_mode,
    aligned,
):
    if pool_mode == 0:
        _refuse("RoIAlign with pool_mode='max'")
    input, rois = _wide(input, rois)
    bins = aligned_height, aligned_width
    rois = rois.to(input.dtype)
    _check_rois(rois, aligned)
    output.copy_(_tv.roi_align(input, rois, spatial_scale, *bins, sampling_ratio, aligned))


@_serves('torchvision.ops.roi_align')
def roi_align_backward(
    grad_output,
    rois,
    argmax_y,
    argmax_x,
    grad_input,
    aligned_height,
    aligned_width,
    spatial_scale,
    sampling_ratio,
    pool_mode,
    aligned,
):
    grad_output, rois = _wide(grad_output, rois)
    sizes = aligned_height, aligned_width, *grad_input.shape
    rois = rois.to(grad_output.dtype)
    grad_input.copy_(
        _tv._roi_align_backward(grad_output, rois, spatial_scale, *sizes, sampling_ratio, aligned)
    )


def _focal(input, target, weight, alpha):
    """Sign and z = sign * logit, so that sigmoid(z) is the probability of the truth; the factor."""
    hit = target[:, None] == torch.arange(input.size(1), device=input.device)
    sign = torch.where(hit, 1.0, -1.0).to(input.dtype)
    factor = torch.where(hit, alpha, 1 - alpha).to(input.dtype)
    if weight.numel():  # of each class; the background, which has no column, counts 1
        factor = factor * torch.cat((weight, weight.new_ones(1)))[target, None]
    return sign, sign * input, factor


def _log_sigmoid(z):
    # Where the probability is 0, mmcv takes the smallest float32 in place of it.
    return F.logsigmoid(z).clamp(min=math.log(torch.finfo(torch.float32).tiny))


@_serves('torch')
def sigmoid_focal_loss_forward(input, target, weight, output, gamma, alpha):
    _, z, factor = _focal(*_wide(input, target, weight), alpha)
    output.copy_(-factor * torch.sigmoid(-z) ** gamma * _log_sigmoid(z))


@_serves('torch')
def sigmoid_focal_loss_backward(input, target, weight, grad_input, gamma, alpha):
    sign, z, factor = _focal(*_wide(input, target, weight), alpha)
    p, rest = torch.sigmoid(z), torch.sigmoid(-z)
    grad_input.copy_(sign * factor * rest**gamma * (gamma * p * _log_sigmoid(z) - rest))


def _wide_offset(offset):
    """In float32; NaN reads nothing, as in mmcv, where torchvision would read beyond its memory."""
    return _wide(offset)[0].nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)


def _offset_gradient(gradient, offset, kernel_size, rest):
    """torchvision's, and 0 as in mmcv for a sample that lies exactly one pixel outside.

    There the derivative has two values. A layer that starts with offsets of 0 has such samples all
    along its border.
    """
    stride, pad, dilation, groups = rest[1:3], rest[3:5], rest[5:7], rest[8]
    place = offset.unflatten(1, (groups, *kernel_size, 2)).clone()  # N, groups, k, k, (y, x), H, W
    for axis, size in enumerate(offset.shape[2:]):
        taps = torch.arange(kernel_size[axis], device=offset.device) * dilation[axis]
        start = torch.arange(size, device=offset.device) * stride[axis] - pad[axis]
        grid = taps[:, None] + start  # k, H or W
        shape = [1, 1, 1, 1]
        shape[axis], shape[axis + 2] = grid.shape
        place[:, :, :, :, axis] += grid.view(shape)
    return gradient.masked_fill((place == -1).view_as(gradient), 0)


def _deform(weight, bias, stride, pad, dilation, group, deformable_group, use_mask):
    """What torchvision's deformable convolution and its gradient take at the end."""
    bias = bias if bias.numel() else weight.new_zeros(len(weight))
    return bias, *stride, *pad, *dilation, group, deformable_group, use_mask


def _deform_v2(weight, bias, s):
    sizes = ((s[f'{name}_h'], s[f'{name}_w']) for name in ('stride', 'pad', 'dilation'))
    bias = bias if s['with_bias'] else bias[:0]
    return _deform(weight, bias, *sizes, s['group'], s['deformable_group'], True)


def _deform_v1(weight, s):
    sizes = ((s[f'{name}H'], s[f'{name}W']) for name in ('d', 'pad', 'dilation'))
    return _deform(weight, weight[:0], *sizes, s['group'], s['deformable_group'], False)


@_serves('torchvision.ops.deform_conv2d')
def modulated_deform_conv_forward(
    input, weight, bias, ones, offset, mask, output, columns, **sizes
):
    input, weight, bias, mask = _wide(input, weight, bias, mask)
    offset = _wide_offset(offset)
    if offset.shape[2:] != output.shape[2:]:  # DyHead's; mmcv reads them as if they had its size
        _refuse('modulated_deform_conv_forward with offsets of another size than the output')
    rest = _deform_v2(weight, bias, sizes)
    output.copy_(_tv.deform_conv2d(input, weight, offset, mask, *rest))


@_serves('torchvision.ops.deform_conv2d')
def modulated_deform_conv_backward(
    input,
    weight,
    bias,
    ones,
    offset,
    mask,
    columns,
    grad_input,
    grad_weight,
    grad_bias,
    grad_offset,
    grad_mask,
    grad_output,
    **sizes,
):
    grad_output, input, weight, mask, bias = _wide(grad_output, input, weight, mask, bias)
    offset = _wide_offset(offset)
    rest = _deform_v2(weight, bias, sizes)
    grads = list(_tv._deform_conv2d_backward(grad_output, input, weight, offset, mask, *rest))
    grads[2] = _offset_gradient(grads[2], offset, weight.shape[2:], rest)
    for grad, into in zip(grads, (grad_input, grad_weight, grad_offset, grad_mask, grad_bias)):
        if into.numel():  # without a bias, its gradient is empty
            into.copy_(grad)


@_serves('torchvision.ops.deform_conv2d')
def deform_conv_forward(input, weight, offset, output, columns, ones, **sizes):
    input, weight = _wide(input, weight)
    offset = _wide_offset(offset)
    no_mask = input.new_zeros(len(input), 1)
    rest = _deform_v1(weight, sizes)
    output.copy_(_tv.deform_conv2d(input, weight, offset, no_mask, *rest))


def _deform_v1_backward(grad_output, input, weight, offset, sizes):
    grad_output, input, weight = _wide(grad_output, input, weight)
    offset, rest = _wide_offset(offset), _deform_v1(weight, sizes)
    no_mask = input.new_zeros(len(input), 1)
    grads = _tv._deform_conv2d_backward(grad_output, input, weight, offset, no_mask, *rest)
    return grads[0], grads[1], _offset_gradient(grads[2], offset, weight.shape[2:], rest)


@_serves('torchvision.ops.deform_conv2d')
def deform_conv_backward_input(
    input, offset, grad_output, grad_input, grad_offset, weight, columns, **sizes
):
    grads = _deform_v1_backward(grad_output, input, weight, offset, sizes)
    grad_input.copy_(grads[0])
    grad_offset.copy_(grads[2])


@_serves('torchvision.ops.deform_conv2d')
def deform_conv_backward_parameters(
    input, offset, grad_output, grad_weight, columns, ones, scale, **sizes
):
    # The weight's gradient needs the weight's shape alone.
    grads = _deform_v1_backward(grad_output, input, torch.zeros_like(grad_weight), offset, sizes)
    grad_weight.add_(grads[1], alpha=scale)


if getattr(mmcv, '__version__', None) not in TESTED:
    warnings.warn(
        f"torchvision's operators stand in for those of mmcv {' and '.join(TESTED)}; the mmcv here "
        f'is {getattr(mmcv, "__version__", "missing")}: install one of those, or compile its own '
        'operators',
        stacklevel=2,
    )

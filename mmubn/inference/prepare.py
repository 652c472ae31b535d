"""A model whose norm layers are as cheap in evaluation as their equations allow."""

import copy
import logging
from collections import Counter
from functools import partial
from typing import Any, Dict, FrozenSet, Iterator, List, NamedTuple, Optional, Tuple, Union

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from .. import layers
from ..convert import drop_and_activate, own_forward, put_in_place
from ..layers.base import RectifiedBatchNorm
from .aside import Aside
from .graph import Calls, read_forward, watch_run
from .layer import Constants, DepthwiseConv2d, Fold, InferenceNorm, constants_of, fold

logger = logging.getLogger('mmubn')


class PreparedLayer(NamedTuple):
    """What became of one norm layer."""

    name: str
    """Its name in the model."""
    kind: str
    """Its type, such as ``'UBN'``."""
    convolution: str
    """Name of the convolution that it was folded into; empty where there is none."""
    left: str
    """What is computed in its place."""
    reason: str
    """Why it was not folded; empty where it was."""

    def __str__(self) -> str:
        where = f'into {self.convolution}' if self.convolution else f'not folded: {self.reason}'
        return f'{self.name} ({self.kind}): {where}; left: {self.left}'


def prepare_for_inference(
    model: nn.Module, example_inputs: Union[Tuple[Any, ...], Tensor, None] = None
) -> nn.Module:
    r"""A copy of a model for inference alone, with the same outputs and cheap norm layers.

    The constant part of every layer of :mod:`mmubn.layers` and BatchNorm2d is folded, exactly,
    into the convolution before it. That is the running statistics. It is the whole layer if all
    calibrations are zero and the kernel is zero beside its middle. What is left is a depthwise
    convolution, and an offset and a factor per image and channel, or less of these; see
    :mod:`mmubn.inference.layer`. If a layer has no convolution of its own, it is not folded, but
    reduced as far as that goes by itself.

    torch.fx reads from the model's forward which convolution comes before a layer, with optional
    arguments at their defaults and without a branch that asks for the type of a tensor. If it
    cannot, or if ``example_inputs`` are given, a run is watched: on these, or on noise, see
    :func:`mmubn.inference.graph.watch_run`.

    One line in the log gives a summary. Each layer is in the list ``inference_report`` of the
    model that is returned, and in the log at level INFO.

    Args:
        model (nn.Module): In evaluation mode. It is left as it is.
        example_inputs (tuple | Tensor, optional): Positional arguments of one call of the
            model, or its only one. The call is run and watched; for a detector, for example,
            ``(images, data_samples, 'predict')``. Needed if layers are reported as not called.

    Returns:
        nn.Module: The copy, without gradients for its parameters. Its state dict differs from
        the model's, and it refuses the model's. So save the copy by ``torch.save``, or prepare
        the model again.

    Raises:
        TypeError: ``example_inputs`` is neither a tuple nor a tensor.
        ValueError: The model is in training mode, compiled, wrapped for several processes,
            prepared already, on several devices, or has no such layer; it cannot be copied,
            such as a pruned one; the example inputs are on another device.
        Exception: What the model itself raises on ``example_inputs``.

    Examples:
        >>> prepared = mmubn.prepare_for_inference(model.eval())
        >>> print(*prepared.inference_report, sep='\n')
    """
    if isinstance(example_inputs, Tensor):
        example_inputs = (example_inputs,)
    _check(model, example_inputs)
    prepared = _copy(model).requires_grad_(False)
    norms = dict(_norms(prepared))
    aside = Aside(prepared)
    calls, unread = _calls(prepared, list(norms.values()), aside, example_inputs)
    names = {id(module): name for name, module in prepared.named_modules()}
    report, by_module, all_gone = [], {}, set()
    for name, norm in norms.items():
        conv, new, left, reason = None, norm, 'the layer as it was', _obstacle(norm, aside)
        if not reason and calls and id(norm) in calls.weights_read:
            reason = 'its weights are read elsewhere'
        if not reason:
            conv, reason = calls.convolution_before(norm) if calls else (None, unread)
            new, left = _replacement(norm, conv)
        by_module[id(norm)] = new
        gone = frozenset(norm.state_dict().keys() - new.state_dict().keys())
        new._register_load_state_dict_pre_hook(partial(_refuse_unprepared, gone))
        all_gone.update(f'{name}.{key}' for key in gone)
        conv_name = '' if conv is None else names[id(conv)]
        report.append(PreparedLayer(name, type(norm).__name__, conv_name, left, reason))
    prepared = put_in_place(prepared, by_module)
    # Before anything is loaded; the hooks of the layers are for parts of the model.
    hook = partial(_refuse_unprepared, frozenset(all_gone))
    prepared._register_load_state_dict_pre_hook(hook)
    prepared.inference_report = report
    _log(report)
    return prepared


def _refuse_unprepared(
    gone: FrozenSet[str], state_dict: Dict[str, Any], prefix: str, *_: Any
) -> None:
    """Raises a ValueError where what took a layer's place is given what the layer held.

    Loaded as far as names agree, it would leave the convolution without the norm that it took in.
    """
    for name in sorted(gone):
        if prefix + name in state_dict:
            raise ValueError(
                f'{prefix}{name} has no place in this prepared model: load the checkpoint into the '
                'model before prepare_for_inference, and prepare it then. A prepared model is kept '
                'by torch.save(prepared, file)'
            )


def _norms(model: nn.Module) -> Iterator[Tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        known = isinstance(module, RectifiedBatchNorm)
        if known or type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm):
            yield name, module


def _check(model: nn.Module, example_inputs: Optional[Tuple[Any, ...]]) -> None:
    """Refuses what cannot be prepared, in one line."""
    if not isinstance(example_inputs, (tuple, type(None))):
        raise TypeError(
            'example_inputs must be a tuple of positional arguments, or a tensor, got '
            f'{type(example_inputs).__name__}'
        )
    modules = dict(model.named_modules())
    if hasattr(model, 'inference_report') or any(
        isinstance(module, InferenceNorm) for module in modules.values()
    ):
        raise ValueError('the model is prepared for inference already')
    for name, module in modules.items():
        shown = f'the model ({name})' if name else 'the model'
        if hasattr(module, '_orig_mod') or getattr(module, '_compiled_call_impl', None):
            raise ValueError(f'{shown} is compiled: prepare it first, then compile what you get')
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f'{shown} is a TorchScript module: prepare the module it was made of')
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            raise ValueError(f'{shown} is wrapped in {type(module).__name__}: pass its .module')
    for name, module in (('', model), *_norms(model)):
        if module.training:
            shown = f'{name} is' if name else 'the model is'
            raise ValueError(f'{shown} in training mode: call model.eval() first')
    if not dict(_norms(model)):
        raise ValueError(
            f'the model has no norm layer to prepare: no {", ".join(layers.__all__)}, BatchNorm2d'
        )
    devices = {str(value.device) for value in (*model.parameters(), *model.buffers())}
    if len(devices) > 1 or 'meta' in devices:
        raise ValueError(
            f'the model is on {" and ".join(sorted(devices))}: move it to one device with data'
        )
    for value in tree_flatten(example_inputs)[0]:
        if isinstance(value, Tensor) and str(value.device) not in devices:
            raise ValueError(
                f'example_inputs are on {value.device}, the model is on {devices.pop()}'
            )


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except RuntimeError as error:
        if 'graph leaves' not in str(error):
            raise
        # Pruning keeps the masked weight of the last call, LeViT the biases of the first.
        raise ValueError(
            'the model holds a tensor that it computed with a gradient, which cannot be copied: '
            'make pruning permanent (torch.nn.utils.prune.remove) and remove weight norm; '
            'otherwise, load it anew and call it in torch.no_grad() alone'
        ) from error


def _calls(
    model: nn.Module,
    norms: List[nn.Module],
    aside: Aside,
    example_inputs: Optional[Tuple[Any, ...]],
) -> Tuple[Optional[Calls], str]:
    """The calls of the layers, or None and why they are not known."""
    if example_inputs is not None:
        return watch_run(model, norms, aside, example_inputs), ''
    try:
        return read_forward(model, norms, aside), ''
    except Exception as error:  # whatever the forward of a model does with torch.fx's proxies
        logger.info('torch.fx cannot read the forward of the model: %s', error)
    try:
        return watch_run(model, norms, aside), ''
    except Exception as error:  # whatever a model raises that wants another input
        logger.info('the model does not run on an image of noise: %s', error)
    return None, 'the order of the layers is not known: pass example_inputs'


def _obstacle(norm: nn.Module, aside: Aside) -> str:
    """Why the layer stays as it is, whatever comes before it."""
    if norm.running_mean is None:
        return 'it has no running statistics'
    if any(hook is not drop_and_activate for hook in norm._forward_hooks.values()):
        return 'it has forward hooks'
    if norm._forward_pre_hooks:
        return 'it has forward pre-hooks'
    if aside.holds(norm):
        return 'a module holds it in a list or another attribute, out of which it is not taken'
    return own_forward(norm)


def _replacement(norm: nn.Module, conv: Optional[nn.Module]) -> Tuple[nn.Module, str]:
    """What takes the layer's place, in words too. The convolution takes its part in."""
    if conv is None and not isinstance(norm, RectifiedBatchNorm):
        return norm, 'the layer as it was'  # a SyncBatchNorm may see input that is not 4D
    dtype = norm.running_mean.dtype if conv is None else conv.weight.dtype
    if conv is not None:
        part, constants = fold(norm)
        _scale(conv, part)
    else:
        constants = constants_of(norm)
    if constants is None:
        new, left = nn.Identity(), 'nothing'
    elif constants.per_image or (constants.kernel_size > 1 and constants.shift is not None):
        new = InferenceNorm(constants, dtype, owns_input=conv is not None)
        parts = dict(
            offset=constants.center_weight, factor=constants.scale_weight, convolution=new.affine
        )
        left = ', '.join(name for name, value in parts.items() if value is not None)
    elif constants.kernel_size > 1:
        new, left = DepthwiseConv2d(constants, dtype), 'convolution'
    else:
        new, left = _batch_norm(norm, constants), 'BatchNorm2d'
    hooks = norm._forward_hooks
    if hooks:  # timm's fused drop and activation
        parts = [new, norm.drop, norm.act]
        new = nn.Sequential(*(part for part in parts if not isinstance(part, nn.Identity)))
    return new.eval(), left


@torch.no_grad()
def _scale(conv: nn.Module, part: Fold) -> None:
    """Makes the convolution give ``scale * (what it gave) + offset``."""
    weight, bias = conv.weight.double(), part.offset
    if isinstance(conv, nn.ConvTranspose2d):  # (in, out / groups, k, k)
        grouped = weight.unflatten(0, (conv.groups, -1))
        weight = (grouped * part.scale.view(conv.groups, 1, -1, 1, 1)).flatten(0, 1)
    else:
        weight = weight * part.scale.view(-1, 1, 1, 1)
    if conv.bias is not None:
        bias = bias + part.scale * conv.bias.double()
    # New parameters, as others may share the old ones.
    dtype = conv.weight.dtype
    conv.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    conv.bias = nn.Parameter(bias.to(dtype), requires_grad=False)


@torch.no_grad()
def _batch_norm(norm: nn.Module, constants: Constants) -> nn.BatchNorm2d:
    """The BatchNorm of a layer that is one, beside a constant factor."""
    place = dict(device=norm.running_mean.device, dtype=norm.running_mean.dtype)
    new = nn.BatchNorm2d(norm.num_features, float(norm.eps), **place)
    std = (norm.running_var.double() + float(norm.eps)).sqrt()
    new.running_mean.copy_(norm.running_mean)
    new.running_var.copy_(norm.running_var)
    new.weight.copy_(constants.taps[:, 0, 0] * std)
    if constants.bias is not None:
        new.bias.copy_(constants.bias)
    return new.requires_grad_(False)


def _log(report: List[PreparedLayer]) -> None:
    for layer in report:
        logger.info('%s', layer)
    apart = [layer for layer in report if not layer.convolution]
    why = Counter(layer.reason for layer in apart)
    logger.info(
        'prepared %d norm layers for inference: %d folded into the convolution before%s',
        len(report),
        len(report) - len(apart),
        ''.join(f'; {count} not: {reason}' for reason, count in why.items()),
    )

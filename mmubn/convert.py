"""Replaces the norm layers of a model that exists. Needs torch alone."""

import fnmatch
import inspect
import logging
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import layers
from .layers.base import RectifiedBatchNorm

logger = logging.getLogger('mmubn')

Patterns = Union[str, Sequence[str]]


def convert_norm(
    model: nn.Module,
    norm_cfg: Dict[str, Any],
    include: Patterns = '*',
    exclude: Patterns = (),
) -> nn.Module:
    """Replaces a model's norm layers in place, such that its output in evaluation stays the same.

    From BatchNorm2d and SyncBatchNorm to UBN, SyncUBN, RBN, BNET or IEBN: weights and
    running statistics are kept as if a checkpoint of BatchNorm were loaded. The fused norm
    and activation layers of timm (``BatchNormAct2d`` and its like) keep their drop and
    activation. From those layers back to ``BN``: only where BatchNorm can give the same
    output. From UBN to SyncUBN and back: with all that the layer holds. Settings that
    ``norm_cfg`` does not name (eps, momentum, …), the device, dtype, training mode and
    ``requires_grad`` are those of the layer replaced. Build the optimizer afterwards: there
    are new parameters. One log line says what was replaced.

    Args:
        model (nn.Module): Any model, or a norm layer itself.
        norm_cfg (dict): ``dict(type='UBN', fct=0.15)``, as in an OpenMMLab config; type
            is one of UBN, SyncUBN, RBN, BNET, IEBN and BN.
        include (str | Sequence[str]): Shell patterns of module names, such as
            ``'layer[34].*'``; what matches none is left alone. Default: ``'*'``.
        exclude (str | Sequence[str]): Shell patterns of module names to leave alone.
            Default: none.

    Returns:
        nn.Module: ``model``, or the new layer where ``model`` is a norm layer itself.

    Raises:
        ValueError: A type or pattern that names nothing; no layer to replace; a layer
            whose output BatchNorm cannot give, named with the reason; a setting with
            which SyncUBN or UBN cannot hold what the other does. The model is then as
            it was.
    """
    settings = dict(norm_cfg)
    kind = settings.pop('type', None)
    if kind not in _TYPES:
        raise ValueError(f'norm_cfg type must be one of {", ".join(_TYPES)}, got {kind!r}')
    target = _TYPES[kind]
    norms = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    chosen = _match(norms, include) - _match(norms, exclude)
    replaced, left = {}, []
    for name, module in norms.items():
        new = _replacement(name, module, target, settings) if name in chosen else None
        if new is None:
            left.append(name)
        else:
            replaced[name] = new
    if not replaced:
        raise ValueError(f'no layer to replace by {kind} among the norm layers: {left}')
    logger.warning(
        '%d of %d norm layers became %s%s',
        len(replaced),
        len(norms),
        kind,
        f'; left alone: {", ".join(left)}' if left else '',
    )
    if '' in replaced:
        return replaced['']
    # A module registered under several names is replaced under each of them.
    by_module = {id(norms[name]): new for name, new in replaced.items()}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children() skips repeats
            if id(child) in by_module:
                setattr(parent, name, by_module[id(child)])
    return model


_TYPES = {
    **{name: getattr(layers, name) for name in ('UBN', 'SyncUBN', 'RBN', 'BNET', 'IEBN')},
    'BN': nn.BatchNorm2d,
}


def _match(norms: Dict[str, nn.Module], patterns: Patterns) -> set:
    matched = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = set(fnmatch.filter(norms, pattern))
        if not found and norms:
            raise ValueError(f'pattern {pattern!r} matches none of the norm layers {list(norms)}')
        matched |= found
    return matched


def _replacement(
    name: str, module: _BatchNorm, target: type, settings: Dict[str, Any]
) -> Optional[nn.Module]:
    """The new layer, or None where this one is not to be replaced."""
    fused = hasattr(module, 'act') and hasattr(module, 'drop')
    # mmengine's SyncBatchNorm is a subclass that checks its input's dimensions and no more.
    is_plain = type(module) is nn.BatchNorm2d or isinstance(module, nn.SyncBatchNorm) or fused
    is_ours = isinstance(module, RectifiedBatchNorm)
    if is_ours and {type(module), target} == {layers.UBN, layers.SyncUBN}:
        new = _other_ubn(name, module, target, settings)
    elif is_ours and target is nn.BatchNorm2d:
        weight, bias = _as_batch_norm(name, module)
        new = _filled(module, target, settings, {'weight': weight, 'bias': bias})
    elif is_plain and not is_ours and target is not nn.BatchNorm2d:
        new = _filled(module, target, settings, {})
    else:
        return None
    if fused:
        new.drop, new.act = module.drop, module.act
        new.register_forward_hook(_drop_and_activate)
    return new.train(module.training)


def _filled(
    module: _BatchNorm, target: type, settings: Dict[str, Any], state: Dict[str, torch.Tensor]
) -> nn.Module:
    """A new layer with what the two kinds share, and ``state`` in place of some of it."""
    kept = dict(
        eps=float(module.eps),
        momentum=module.momentum,
        affine=module.affine or bool(state),
        track_running_stats=module.track_running_stats,
        **_place(module),
    )
    if target is layers.SyncUBN:
        kept['process_group'] = getattr(module, 'process_group', None)
    new = target(module.num_features, **{**kept, **settings})
    state = {**module.state_dict(), **state}
    if isinstance(new, RectifiedBatchNorm):
        state.update(new._complete_batch_norm(state, ''))
    wanted = new.state_dict()
    new.load_state_dict({key: value for key, value in state.items() if key in wanted})
    for parameter in new.parameters():
        parameter.requires_grad_(all(p.requires_grad for p in module.parameters()))
    return new


def _place(module: nn.Module) -> Dict[str, Any]:
    """Its device and floating dtype, where it holds any numbers."""
    values = (*module.parameters(), *module.buffers())
    like = next((value for value in values if value.is_floating_point()), None)
    return {} if like is None else dict(device=like.device, dtype=like.dtype)


def _other_ubn(name: str, module: layers.UBN, target: type, settings: Dict[str, Any]) -> layers.UBN:
    """The same layer, synchronised or no longer."""
    known = inspect.signature(target).parameters
    kept = {key: getattr(module, key) for key in known if hasattr(module, key)}
    kept.update(_place(module), eps=float(module.eps))
    new = target(**{**kept, **settings})
    state = module.state_dict()
    if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in new.state_dict().items()}:
        raise ValueError(
            f'{name or "the layer"} holds other weights than {target.__name__} with {settings} does'
        )
    new.load_state_dict(state)
    for key, parameter in module.named_parameters():
        getattr(new, key).requires_grad_(parameter.requires_grad)
    return new


def _drop_and_activate(module: nn.Module, args: Tuple, output: torch.Tensor) -> torch.Tensor:
    return module.act(module.drop(output))


@torch.no_grad()
def _as_batch_norm(name: str, module: RectifiedBatchNorm) -> Tuple[torch.Tensor, torch.Tensor]:
    """The weight and bias of the BatchNorm with the same output in evaluation."""
    reasons: List[str] = []
    like = module.running_mean if module.running_mean is not None else next(module.parameters())
    weight = torch.ones(module.num_features, device=like.device, dtype=like.dtype)
    bias = torch.zeros_like(weight)
    if module.affine:
        weight, bias = module.weight.clone(), module.bias.clone()
    for key in ('center_weight', 'scale_weight'):
        value = getattr(module, key)
        if value is not None and value.any():
            reasons.append(f'{key} is not zero, so the output depends on the mean of each image')
    if module.scale_bias is not None:
        weight = weight * torch.sigmoid(module.scale_bias)
    if module.kernel is not None:
        middle = module.kernel_size // 2
        tap = module.kernel[:, 0, middle, middle]
        rest = module.kernel.clone()
        rest[:, 0, middle, middle] = 0
        if rest.any():
            reasons.append('kernel has taps beside its middle, so the output mixes neighbours')
        weight = weight * tap
    if reasons:
        raise ValueError(f'{name or "the layer"} cannot become BatchNorm: {"; ".join(reasons)}')
    return weight, bias

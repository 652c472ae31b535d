"""Replaces the norm layers of a model that exists. Needs torch alone."""

import fnmatch
import logging
import weakref
from collections import Counter
from typing import Any, Dict, List, Sequence, Tuple, Union

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import layers
from .layers import SYNCHRONISED
from .layers.base import TRACKED, RectifiedBatchNorm, keywords

logger = logging.getLogger('mmubn')

Patterns = Union[str, Sequence[str]]


def convert_norm(
    model: nn.Module,
    norm_cfg: Dict[str, Any],
    include: Patterns = '*',
    exclude: Patterns = (),
) -> nn.Module:
    """Replaces a model's norm layers in place, such that its output in evaluation stays the same.

    - From BatchNorm2d and SyncBatchNorm to a type of :mod:`mmubn.layers`: weights and
      running statistics are kept as if a checkpoint of BatchNorm were loaded. The fused
      norm and activation layers of timm (such as ``BatchNormAct2d``) keep their drop and
      activation.
    - From those types back to ``BN``: only if BatchNorm can give the same output.
    - From UBN to SyncUBN and back: everything that the layer holds is kept.

    Name in ``exclude`` a SyncBatchNorm that stands in for a BatchNorm1d: it looks like the others,
    and the new layers take images alone.

    A layer that a plain list, tuple, set or dict of a module holds too is left alone: a forward
    that takes it from there would go on to use the old one.

    Parameters and buffers that keep their value are the very same tensors. So they keep
    dtype, device, ``requires_grad`` and gradient, and stay shared with other layers. A
    weight that takes another value keeps all of these but the gradient. Parameters that
    BatchNorm does not have take dtype, device and ``requires_grad`` from the weight. The
    training mode, hooks and settings that ``norm_cfg`` does not name (eps, momentum, …) are
    those of the old layer. Build the optimizer afterwards, because there are new
    parameters. One line of the log says what was replaced, and why each other norm layer was
    not: a warning if ``include`` and ``exclude`` chose one of these, else of level INFO.

    Args:
        model (nn.Module): Any model, or a norm layer itself.
        norm_cfg (dict): ``dict(type='UBN', fct=0.15)``, as in an OpenMMLab config; type
            is that of a layer of :mod:`mmubn.layers`, or BN. ``requires_grad``, if given, is
            set on all parameters of the new layers.
        include (str | Sequence[str]): Shell patterns of module names, such as
            ``'layer[34].*'``. A layer that matches no pattern is left alone.
            Default: ``'*'``.
        exclude (str | Sequence[str]): Shell patterns of module names to leave alone.
            Default: none.

    Returns:
        nn.Module: ``model``, or the new layer where ``model`` is a norm layer itself.

    Raises:
        TypeError: ``norm_cfg`` is not a dict; the type does not know a setting.
        ValueError: A type or pattern names nothing; no layer can be replaced, with the
            reason for each; BatchNorm cannot give the output of a layer, with its name and
            the reason; with a setting the new layer cannot hold what the old one does; a
            weight would change and belongs to another layer too; the model is wrapped in
            DistributedDataParallel, which would not synchronise new parameters. The model
            is then as it was.
    """
    if not isinstance(norm_cfg, dict):
        raise TypeError(f"norm_cfg must be a dict, such as dict(type='UBN'), got {norm_cfg!r}")
    settings = dict(norm_cfg)
    kind = settings.pop('type', None)
    kind = kind.__name__ if isinstance(kind, type) else kind  # as in mmengine's pure Python configs
    requires_grad = settings.pop('requires_grad', None)
    if kind not in _TYPES:
        raise ValueError(f'norm_cfg type must be one of {", ".join(_TYPES)}, got {kind!r}')
    target = _TYPES[kind]
    norms = {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, _BatchNorm) or _holds_constants(m)
    }
    chosen = _match(norms, include) - _match(norms, exclude)
    aside = _in_containers(model)
    left: Dict[str, List[str]] = {}  # reason -> names
    replaced, weights = {}, _Weights()
    for name, module in norms.items():
        reason = _why_not(module, target) if name in chosen else _NOT_CHOSEN
        if not reason and id(module) in aside:
            reason = f'{aside[id(module)]} holds it too and would go on to use the old layer'
        if reason:
            left.setdefault(reason, []).append(name or 'the layer')
        else:
            replaced[name] = _replacement(name, module, target, settings, weights)
    why = '; '.join(f'{", ".join(names)} ({reason})' for reason, names in left.items())
    if not replaced:
        raise ValueError(f'no layer to replace by {kind}: {why or _other_norms(model)}')
    weights.check(model, [norms[name] for name in replaced])
    _check_wrapper(model, replaced)
    logger.log(
        logging.WARNING if left.keys() - {_NOT_CHOSEN} else logging.INFO,
        '%d of %d norm layers became %s%s',
        len(replaced),
        len(norms),
        kind,
        f'; left alone: {why}' if why else '',
    )
    for name, new in replaced.items():
        _take_hooks(norms[name], new)
        if requires_grad is not None:
            new.requires_grad_(requires_grad)
    return put_in_place(model, {id(norms[name]): new for name, new in replaced.items()})


def put_in_place(model: nn.Module, new: Dict[int, nn.Module]) -> nn.Module:
    """Puts modules in the place of those with these ids, under each of their names.

    Returns:
        nn.Module: The model, or what takes its own place.
    """
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children() skips repeats
            if id(child) in new:
                setattr(parent, name, new[id(child)])
    return new.get(id(model), model)


_NOT_CHOSEN = 'not chosen by include and exclude'
_TYPES = {
    **{name: getattr(layers, name) for name in layers.__all__},
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


def _in_containers(model: nn.Module) -> Dict[int, str]:
    """Attributes, by the ids of the modules in them, that hold modules and register none.

    They are lists, tuples, sets and dicts, in one another too, as in ``self.steps = [conv, norm]``.
    :class:`mmubn.inference.aside.Aside` looks into any object, but it copies the model, and a layer
    with a process group cannot be copied.
    """
    found: Dict[int, str] = {}
    for name, module in model.named_modules():
        seen = {id(module._modules)}
        todo = [(f'{name}.{key}'.lstrip('.'), value) for key, value in vars(module).items()]
        while todo:
            key, value = todo.pop()
            if isinstance(value, nn.Module):
                found[id(value)] = key
            elif isinstance(value, (list, tuple, set, dict)) and id(value) not in seen:
                seen.add(id(value))
                inside = value.values() if isinstance(value, dict) else value
                todo += [(key, each) for each in inside]
    return found


def _is_fused(module: nn.Module) -> bool:
    """Whether it is one of timm's layers of norm, drop and activation, or was one before."""
    if drop_and_activate in module._forward_hooks.values():
        return True
    owner = next(kind for kind in type(module).__mro__ if 'forward' in vars(kind))
    is_timms = owner.__module__.split('.')[0] == 'timm'
    return is_timms and hasattr(module, 'act') and hasattr(module, 'drop')


def _holds_constants(module: nn.Module) -> bool:
    """Whether it is a frozen BatchNorm, such as torchvision's, which is no ``_BatchNorm``."""
    return {'weight', 'running_mean', 'running_var'} <= module._buffers.keys()


# Pairs that can become each other.
_TWINS = {*SYNCHRONISED.items(), *((twin, kind) for kind, twin in SYNCHRONISED.items())}


def _why_not(module: nn.Module, target: type) -> str:
    """Why this layer cannot be replaced by such a one; empty where it can."""
    kind = type(module).__name__
    if _holds_constants(module):
        return f'{kind}, which does not train; build the model with BatchNorm2d, then load weights'
    if type(module) is target:
        return f'already {kind}; set its attributes, such as eps or fct, to change it'
    if any(hasattr(value, 'to_local') for value in module.parameters()):  # DTensors, of FSDP
        return 'its parameters are sharded; convert the model before fully_shard'
    if isinstance(module, RectifiedBatchNorm):
        if target is nn.BatchNorm2d or (type(module), target) in _TWINS:
            return _would_be_lost(module)
        pairs = ', '.join(f'{a.__name__} and {b.__name__}' for a, b in SYNCHRONISED.items())
        return f'{kind}, which can only become BN; {pairs} can also become each other'
    if target is nn.BatchNorm2d:
        return f'{kind}; {", ".join(layers.__all__[:-1])} and {layers.__all__[-1]} can be replaced'
    # mmengine's SyncBatchNorm is a subclass that checks its input's dimensions and no more.
    is_plain = type(module) is nn.BatchNorm2d or isinstance(module, nn.SyncBatchNorm)
    if not (is_plain or _is_fused(module)):
        sources = 'BatchNorm2d, SyncBatchNorm and those of timm with an activation'
        return f'{kind}; {sources} can be replaced'
    if set(module._parameters) != {'weight', 'bias'}:
        return 'its parameters are parametrized or pruned; make that permanent first'
    return _would_be_lost(module)


def _would_be_lost(module: _BatchNorm) -> str:
    """What somebody added to this layer, which no other would have."""
    known = {'drop', 'act'} if _is_fused(module) else set()
    added = dict(
        buffers=set(module._buffers) - {*TRACKED, 'running_similarity'},
        layers=set(module._modules) - known,
    )
    named = [f'{what} {", ".join(sorted(names))}' for what, names in added.items() if names]
    if named:
        kind = type(module).__name__
        return f'{" and ".join(named)} beside those of {kind}, which would be lost'
    return own_forward(module)


def own_forward(module: _BatchNorm) -> str:
    """Says that a layer computes something of its own, which no other would; empty if not."""
    if 'forward' in vars(module):
        return 'its forward was replaced on the layer, which would be lost'
    known = (RectifiedBatchNorm.forward, nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward)
    if type(module).forward not in known and not _is_fused(module):
        return f'{type(module).__name__} has a forward of its own, which would be lost'
    return ''


def _other_norms(model: nn.Module) -> str:
    """What to say of a model that has no BatchNorm at all."""
    # What has no weight is no layer, such as timm's NormFreeBlock.
    norms = (m for m in model.modules() if 'weight' in m._parameters)
    kinds = Counter(type(m).__name__ for m in norms if 'Norm' in type(m).__name__)
    found = ', '.join(f'{count} {kind}' for kind, count in kinds.items())
    return f'the model has no BatchNorm; its norm layers are: {found or "none"}'


class _Weights:
    """The weights with another value, such that layers that shared one share the new one."""

    def __init__(self) -> None:
        self._new: Dict[int, nn.Parameter] = {}
        self._old: Dict[int, nn.Parameter] = {}

    def replace(self, old: nn.Parameter, value: torch.Tensor) -> nn.Parameter:
        """The parameter in place of ``old``, made at the first call."""
        if id(old) not in self._new:
            new = nn.Parameter(value.to(old.dtype), requires_grad=old.requires_grad)
            new.__dict__.update(old.__dict__)  # marks such as timm's _no_weight_decay
            # The very dicts, so that the hooks' handles go on to work.
            new._backward_hooks = old._backward_hooks
            new._post_accumulate_grad_hooks = old._post_accumulate_grad_hooks
            self._old[id(old)] = old
            self._new[id(old)] = new.share_memory_() if _is_shared(old) else new
        return self._new[id(old)]

    def check(self, model: nn.Module, replaced: Sequence[nn.Module]) -> None:
        """Raises a ValueError where a weight belongs to a layer that is not replaced, too."""
        ids = {id(module) for module in replaced}
        for name, module in model.named_modules():
            for key, value in module._parameters.items():
                if id(value) in self._old and id(module) not in ids:
                    raise ValueError(
                        f'{name}.{key} is also the weight of a layer to replace, where it takes '
                        'another value: convert both or neither, by include and exclude'
                    )


def _check_wrapper(model: nn.Module, replaced: Dict[str, nn.Module]) -> None:
    """Raises a ValueError where a wrapper would leave the gradients of new parameters out."""
    held = {id(value) for value in model.parameters()}
    names = [
        name for name, new in replaced.items() if any(id(p) not in held for p in new.parameters())
    ]
    for path, module in model.named_modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            inside = [name for name in names if name.startswith(f'{path}.' if path else '')]
            if inside:
                raise ValueError(
                    f'{inside[0]} would get parameters that {type(module).__name__} does not '
                    'synchronise: convert the model first, then wrap it'
                )


def _replacement(
    name: str, module: _BatchNorm, target: type, settings: Dict[str, Any], weights: _Weights
) -> nn.Module:
    """The new layer, with all that the old one holds."""
    try:
        if isinstance(module, RectifiedBatchNorm) and target is not nn.BatchNorm2d:
            new = _other_ubn(module, target, settings)
        else:
            new = _filled(module, target, settings, weights)
    except ValueError as error:
        kind = 'BatchNorm' if target is nn.BatchNorm2d else target.__name__
        raise ValueError(f'{name or "the layer"} cannot become {kind}: {error}') from error
    # After the constructor, as both may have been changed on the built layer.
    if 'track_running_stats' not in settings:
        new.track_running_stats = module.track_running_stats
    if _is_fused(module):
        new.drop, new.act = module.drop, module.act
    return new.train(module.training)


def _filled(
    module: _BatchNorm, target: type, settings: Dict[str, Any], weights: _Weights
) -> nn.Module:
    """A new layer with what the two kinds share, and the rest such that the output is the same."""
    state = {**module._parameters, **module._buffers}
    state = {key: value for key, value in state.items() if value is not None}
    changed = _as_batch_norm(module) if target is nn.BatchNorm2d else {}
    kept = dict(
        eps=float(module.eps),
        momentum=module.momentum,
        affine=not changed.keys().isdisjoint(_AFFINE) or not state.keys().isdisjoint(_AFFINE),
        track_running_stats=module.running_mean is not None,
        **_place(module),
    )
    if target in SYNCHRONISED.values():
        kept['process_group'] = getattr(module, 'process_group', None)
    new = target(module.num_features, **{**kept, **settings})
    if isinstance(new, RectifiedBatchNorm):
        new.requires_grad_(module.weight is None or module.weight.requires_grad)
        changed = new._complete_batch_norm(state, '')
    lost = [key for key in (*_AFFINE, *TRACKED) if key in state and getattr(new, key) is None]
    if lost:
        raise ValueError(f'with {settings} there would be no {" and ".join(lost)}')
    for key in (*_AFFINE, *TRACKED):
        held = new._parameters if key in _AFFINE else new._buffers
        if key in state and key in changed:
            held[key] = weights.replace(state[key], changed.pop(key))
        elif key in state:
            held[key] = state[key]
        elif key in settings:
            pass  # bias=True, for a layer without one
        elif getattr(module, 'affine' if key in _AFFINE else 'track_running_stats'):
            held[key] = None  # taken away on the built layer, or never there
            changed.pop(key, None)
    with torch.no_grad():
        for key, value in changed.items():
            getattr(new, key).copy_(value)
    if any(map(_is_shared, state.values())):
        new.share_memory()
    return new


_AFFINE = ('weight', 'bias')


def _is_shared(value: torch.Tensor) -> bool:
    """Whether other processes see it."""
    return value.device.type == 'cpu' and value.is_shared()


def _place(module: nn.Module) -> Dict[str, Any]:
    """Its device and floating dtype, where it holds any numbers."""
    values = (*module.parameters(), *module.buffers())
    like = next((value for value in values if value.is_floating_point()), None)
    return {} if like is None else dict(device=like.device, dtype=like.dtype)


def _other_ubn(module: layers.UBN, target: type, settings: Dict[str, Any]) -> layers.UBN:
    """The same layer, synchronised or no longer."""
    kept = {key: getattr(module, key) for key in keywords(target) if hasattr(module, key)}
    kept.update(_place(module), eps=float(module.eps))
    # The attributes of these names are what was asked for once, and a tensor.
    kept.update(track_running_stats=module.running_mean is not None, bias=module.bias is not None)
    new = target(**{**kept, **settings})
    if _shapes(new) != _shapes(target(**kept)):
        raise ValueError(f'its weights do not fit {target.__name__} with {settings}')
    new._parameters.update(module._parameters)
    new._buffers.update(module._buffers)
    return new


def _shapes(module: nn.Module) -> Dict[str, torch.Size]:
    return {name: value.shape for name, value in module.state_dict().items()}


def _take_hooks(module: nn.Module, new: nn.Module) -> None:
    """Puts the hooks of the old layer on the new one; their handles go on to work."""
    for key, hooks in vars(module).items():
        if 'hook' in key and isinstance(hooks, dict) and hooks:
            setattr(new, key, hooks)
            for hook in hooks.values():  # torch's wrapper hands on the layer that it was put on
                if isinstance(getattr(hook, 'module', None), weakref.ref):
                    hook.module = weakref.ref(new)
    new._is_full_backward_hook = module._is_full_backward_hook  # of the kind of backward hooks
    if _is_fused(module) and drop_and_activate not in new._forward_hooks.values():
        handle = new.register_forward_hook(drop_and_activate)
        new._forward_hooks.move_to_end(handle.id, last=False)


def drop_and_activate(module: nn.Module, args: Tuple, output: torch.Tensor) -> torch.Tensor:
    """The hook of a layer that took the place of a fused one of timm."""
    return module.act(module.drop(output))


@torch.no_grad()
def _as_batch_norm(module: RectifiedBatchNorm) -> Dict[str, torch.Tensor]:
    """The weight and bias of the BatchNorm with the same output, where they are not the layer's."""
    reasons: List[str] = []
    for key in ('center_weight', 'scale_weight'):
        value = getattr(module, key)
        if value is not None and value.any():
            reasons.append(f'{key} is not zero, so the output depends on the mean of each image')
    factors = []
    if module.scale_bias is not None:
        factors.append(torch.sigmoid(module.scale_bias))
    if module.kernel is not None:
        middle = module.kernel.shape[-1] // 2
        factors.append(module.kernel[:, 0, middle, middle])
        rest = module.kernel.clone()
        rest[:, 0, middle, middle] = 0
        if rest.any():
            reasons.append('kernel has taps beside its middle, so the output mixes neighbours')
    if reasons:
        raise ValueError('; '.join(reasons))
    if not factors:
        return {}
    weight = factors[0].new_ones(()) if module.weight is None else module.weight
    for factor in factors:
        weight = weight * factor
    return {'weight': weight}

"""Checks that a config is laid out as mmengine's Runner reads it."""

import difflib
import inspect
from typing import (
    Any,
    Callable,
    Collection,
    Iterator,
    NamedTuple,
    Optional,
    Set,
    Tuple,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from mmengine import registry as roots
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmengine.registry import Registry
from mmengine.runner import (
    EpochBasedTrainLoop,
    IterBasedTrainLoop,
    LogProcessor,
    Runner,
    TestLoop,
    ValLoop,
)
from mmengine.visualization import Visualizer
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.utils.data import DataLoader

from ..walk import each, hook_nodes, type_name, walk
from .errors import CommandError, warn
from .lookup import Arguments, did_you_mean, find_class, near_type

# What else the tools and mmengine read from the top of a config.
_OTHER_KEYS = (
    'activation_checkpointing',
    'compile',
    'custom_imports',
    'efficient_conv_bn_eval',
    'find_unused_parameters',
    'init_weights_for_test_or_val',
    'model_wrapper_cfg',
    'runner_type',
    'strategy',
    'sync_bn',
)
RUNNER_KEYS = {*inspect.signature(Runner.__init__).parameters, *_OTHER_KEYS} - {'self', 'cfg'}

_NEEDED = dict(
    train=('train_dataloader', 'train_cfg', 'optim_wrapper'),
    val=('val_dataloader', 'val_cfg', 'val_evaluator'),
    test=('test_dataloader', 'test_cfg', 'test_evaluator'),
)
_MODEL_PARTS = ('_cfg', 'backbone', 'neck', 'head', 'data_preprocessor')


class Part(NamedTuple):
    """A dict of the config from which mmengine builds something.

    Attributes:
        path: Its dotted path.
        node: What stands there.
        registry: Where its ``type`` is looked up; None where it has none.
        default: What is built without a ``type``; None where it must be there.
        required: Keys that the builder reads itself.
        given: Arguments that the builder adds, and keys that it reads if they are there.
        strict: Whether a key that it does not know is an error, and not just without effect.
    """

    path: str
    node: Any
    registry: Optional[Registry] = None
    default: Optional[Callable] = None
    required: Tuple[str, ...] = ()
    given: Tuple[str, ...] = ()
    strict: bool = True


def check_config(cfg: Config, work: Optional[str] = None) -> None:
    """Looks for what is left out, of another kind, or unknown to what it is given to.

    The model's own settings are its constructors' matter: of the model only the kinds are
    looked at.

    Args:
        cfg (Config): The resolved config; its default scope must be in force.
        work (str): 'train' or 'test', of which nothing may be left out; None is both, as far as
            the config has them.

    Raises:
        CommandError: The first that is found.
    """
    if cfg.get('model') is None:
        raise CommandError(f'config {cfg.filename}: model is left out')
    for key, hint in get_type_hints(Runner.__init__).items():
        _check_kind(key, cfg.get(key), _kinds(hint))
    for split, keys in _NEEDED.items():
        absent = [key for key in keys if cfg.get(key) is None]
        if absent and (split == work or len(absent) < len(keys)):
            raise CommandError(
                f'config {cfg.filename}: {absent[0]} is left out; {", ".join(keys[:-1])} and '
                f'{keys[-1]} belong together'
            )
    for part in _parts(cfg, ['test'] if work == 'test' else _NEEDED):
        _check_part(part)
    for path, node in walk(cfg.model, 'model'):  # a name for a dict, such as norm_cfg='UBN'
        for key, value in node.items():
            if isinstance(value, str) and str(key).endswith(_MODEL_PARTS):
                _check_kind(f'{path}.{key}', value, [dict])


def _kinds(hint: Any) -> Set[type]:
    """Of dict and list, those that a type hint allows; empty for others."""
    if get_origin(hint) is Union:
        return set().union(*(_kinds(option) for option in get_args(hint)))
    return {kind for kind in (dict, list) if (get_origin(hint) or hint) is kind}


def _check_kind(path: str, value: Any, kinds: Collection[type]) -> None:
    names = {dict: 'a dict', list: 'a list', tuple: 'a list'}
    if not kinds or value is None or not isinstance(value, (dict, list, tuple, str, int, float)):
        return
    if isinstance(value, tuple(kinds)) or (list in kinds and isinstance(value, tuple)):
        return
    wanted = ' or '.join(names[kind] for kind in (dict, list) if kind in kinds)
    got = next((name for kind, name in names.items() if isinstance(value, kind)), repr(value))
    remedy = ''
    if isinstance(value, str):
        remedy = f"; write dict(type='{value}', ...)" if dict in kinds else ''
    elif isinstance(value, dict):
        remedy = '; put it in [ ]'
    raise CommandError(f'{path}: must be {wanted}, got {got}{remedy}')


def _parts(cfg: Config, splits: Collection[str]) -> Iterator[Part]:
    # Each part is checked before the next is asked for, which may rely on it.
    for split in splits:
        yield from _split_parts(cfg, split)
    if 'train' in splits and cfg.get('optim_wrapper') is not None:
        yield from _optimizer_parts(cfg)
    for path, node in hook_nodes(cfg):
        yield Part(path, node, roots.HOOKS, given=('priority',))
    if cfg.get('visualizer') is not None:
        yield Part('visualizer', cfg.visualizer, roots.VISUALIZERS, Visualizer, given=('name',))
        backends = cfg.visualizer.get('vis_backends')
        _check_kind('visualizer.vis_backends', backends, [list])
        for path, node in each(backends, 'visualizer.vis_backends'):
            yield Part(path, node, roots.VISBACKENDS, given=('save_dir',))
    if cfg.get('log_processor') is not None:
        yield Part('log_processor', cfg.log_processor, roots.LOG_PROCESSORS, LogProcessor)
    plain = dict(randomness=Runner.set_randomness, env_cfg=_env_cfg, auto_scale_lr=_auto_scale_lr)
    for key, takes in plain.items():
        if cfg.get(key) is not None:
            yield Part(key, cfg[key], None, takes, given=('self',), strict=key == 'randomness')


def _split_parts(cfg: Config, split: str) -> Iterator[Part]:
    key = f'{split}_dataloader'
    if cfg.get(key) is not None:
        yield from _loader_parts(cfg[key], key)
    key = f'{split}_evaluator'
    evaluator = cfg.get(key)
    if isinstance(evaluator, dict) and 'type' not in evaluator and 'metrics' in evaluator:
        evaluator, key = evaluator['metrics'], f'{key}.metrics'
    for path, node in each(evaluator, key):
        if not isinstance(node, dict) or 'metrics' not in node:  # an Evaluator by its type
            yield Part(path, node, roots.METRICS)
    loop = cfg.get(f'{split}_cfg')
    if isinstance(loop, dict):
        trains = EpochBasedTrainLoop if loop.get('by_epoch', True) else IterBasedTrainLoop
        default = dict(train=trains, val=ValLoop, test=TestLoop)[split]
        required = ('by_epoch',) if split == 'train' and 'type' not in loop else ()
        given = ('runner', 'dataloader', 'evaluator')
        yield Part(f'{split}_cfg', loop, roots.LOOPS, default, required, given)


def _env_cfg(cudnn_benchmark=False, mp_cfg=None, dist_cfg=None, resource_limit=4096) -> None:
    """What Runner reads of it."""


def _auto_scale_lr(base_batch_size=None, enable=False) -> None:
    """What Runner reads of it."""


def _loader_parts(loader: dict, key: str) -> Iterator[Part]:
    given = ('num_batch_per_epoch', 'disable_subprocess_warning')
    yield Part(key, loader, None, DataLoader, ('dataset', 'sampler'), given)
    yield from _dataset_parts(loader['dataset'], f'{key}.dataset')
    given = ('dataset', 'seed', 'sampler', 'batch_size')
    for name in ('sampler', 'batch_sampler'):
        if loader.get(name) is not None:
            yield Part(f'{key}.{name}', loader[name], roots.DATA_SAMPLERS, given=given)


def _dataset_parts(node: Any, path: str) -> Iterator[Part]:
    yield Part(path, node, roots.DATASETS)
    if not isinstance(node, dict):
        return
    if 'dataset' in node:
        yield from _dataset_parts(node['dataset'], f'{path}.dataset')
    _check_kind(f'{path}.datasets', node.get('datasets'), [list])
    for child, dataset in each(node.get('datasets'), f'{path}.datasets'):
        yield from _dataset_parts(dataset, child)
    yield from _transform_parts(node.get('pipeline'), f'{path}.pipeline')


def _transform_parts(pipeline: Any, path: str) -> Iterator[Part]:
    _check_kind(path, pipeline, [list])
    for child, node in each(pipeline, path):
        if isinstance(node, (list, tuple)):  # RandomChoice picks one of several pipelines
            yield from _transform_parts(node, child)
            continue
        yield Part(child, node, roots.TRANSFORMS)
        # Under the same key others have what is not registered, such as Albu.
        if isinstance(node, dict) and type_name(node) in _OF_TRANSFORMS:
            nested = node.get('transforms')
            if isinstance(nested, (list, tuple)):
                yield from _transform_parts(nested, f'{child}.transforms')


_OF_TRANSFORMS = ('RandomApply', 'RandomChoice', 'Compose', 'TestTimeAug')


def _optimizer_parts(cfg: Config) -> Iterator[Part]:
    wrapper = cfg.optim_wrapper
    if not any(isinstance(value, OptimWrapper) for value in wrapper.values()):  # several are built
        required = () if 'constructor' in wrapper else ('optimizer',)
        given = ('optimizer', 'constructor', 'paramwise_cfg', 'accumulative_counts')
        yield Part('optim_wrapper', wrapper, roots.OPTIM_WRAPPERS, OptimWrapper, required, given)
        yield from _wrapper_parts(wrapper)
    if wrapper.get('optimizer') is not None:
        path = 'optim_wrapper.optimizer'
        yield Part(path, wrapper['optimizer'], roots.OPTIMIZERS, given=('params',))
    schedulers = cfg.get('param_scheduler')
    if not isinstance(schedulers, dict) or 'type' in schedulers:  # else those of several optimizers
        given = ('optimizer', 'convert_to_iter_based')
        for path, node in each(schedulers, 'param_scheduler'):
            yield Part(path, node, roots.PARAM_SCHEDULERS, given=given)


def _wrapper_parts(wrapper: dict) -> Iterator[Part]:
    path, settings = 'optim_wrapper.paramwise_cfg', wrapper.get('paramwise_cfg')
    # Another constructor may read other keys.
    if settings is not None and wrapper.get('constructor', _CONSTRUCTOR) == _CONSTRUCTOR:
        yield Part(path, settings, None, _paramwise_cfg, strict=False)
    path, clip = 'optim_wrapper.clip_grad', wrapper.get('clip_grad')
    if clip is not None:
        _check_kind(path, clip, [dict])
        kind = clip.get('type', 'norm')
        if kind not in _CLIP:
            raise CommandError(f'{path}.type: must be {" or ".join(_CLIP)}, got {kind!r}')
        yield Part(path, clip, None, _CLIP[kind], given=('parameters',))


_CONSTRUCTOR = 'DefaultOptimWrapperConstructor'
_CLIP = dict(norm=clip_grad_norm_, value=clip_grad_value_)


def _paramwise_cfg(
    custom_keys=None,
    bias_lr_mult=None,
    bias_decay_mult=None,
    norm_decay_mult=None,
    dwconv_decay_mult=None,
    flat_decay_mult=None,
    dcn_offset_lr_mult=None,
    bypass_duplicate=False,
) -> None:
    """What mmengine's DefaultOptimWrapperConstructor reads of it."""


def _check_part(part: Part) -> None:
    _check_kind(part.path, part.node, [dict])
    if not isinstance(part.node, dict):
        return  # built already
    for key in part.required:
        if key not in part.node:
            raise CommandError(f'{part.path}: {key} is left out')
    build = part.default
    if part.registry is not None:
        if 'type' in part.node:
            build = find_class(part.node, part.registry)
            if build is None:
                raise CommandError(
                    f"{part.path}: no {part.registry.name} is registered as '{part.node['type']}'"
                    f'{near_type(part.node, part.registry)}'
                )
        elif build is None:
            raise CommandError(f"{part.path}: type is left out; write type='...'{_found(part)}")
    arguments = Arguments(build)
    own = {*part.required, *part.given, 'type', '_scope_'}
    unknown = [key for key in part.node if key not in own and not arguments.take(key)]
    name = getattr(build, '__name__', str(build)) if part.registry else part.path
    for key in unknown:
        hint = did_you_mean(key, arguments.names - {'self'})
        told = f"{part.path}: {name} takes no '{key}'{hint}"
        # What it does with a key of another name cannot be seen.
        if hint or (part.strict and not arguments.hands_on):
            raise CommandError(told)
        warn(f'{told}, as far as can be seen')
    missing = [key for key in arguments.required if key not in part.node and key not in own]
    if missing:
        raise CommandError(f'{part.path}: {missing[0]} is left out; {name} needs it')


def _found(part: Part) -> str:
    nearest = [key for key in part.node if difflib.get_close_matches(key, ['type'])]
    return f", not '{nearest[0]}'" if nearest else ''

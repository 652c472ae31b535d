"""Checks that the checkpoints can be read, and fit the model."""

import contextlib
import copy
import logging
import pickle
import re
from typing import Dict, Iterator, List, Optional

import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.runner import CheckpointLoader, load_state_dict
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .errors import CommandError
from .resume_check import check_resumed
from .walk import walk

# Keys of the state dict by the way in which they do not fit.
Differences = Dict[str, List[str]]


def check_pretrained(cfg: Config) -> None:
    """Reads the weights of every ``init_cfg``, fetching those that are not cached yet.

    Where they fill a module with layers of BatchNorm's kind, these must fit. What else
    differs passes, such as the classifier of a whole network or the stages above those
    that the module has. A norm layer that only the module has, as a plugin of ResNet may
    bring, is taken for one of a deeper network and refused.

    Args:
        cfg (Config): The resolved config.

    Raises:
        CommandError: They are unreachable, missing, broken, or of another depth or norm.
    """
    model = None
    for path, node in walk(cfg.model, 'model'):
        if node.get('type') not in ('Pretrained', 'PretrainedInit') or 'checkpoint' not in node:
            continue
        remedy = (
            f'train without by --cfg-options {path}=None, '
            f'or from a local file by --cfg-options {path}.checkpoint=FILE'
        )
        checkpoint = read_checkpoint(f'{path}.checkpoint', node['checkpoint'], remedy)
        place = re.fullmatch(r'model\.(?:(.+)\.)?init_cfg(?:\.\d+)?', path)
        if place is not None:
            model = model or build_model(cfg)
            _check_filled(path, node, checkpoint, model, place[1] or '', remedy)


def _check_filled(
    path: str, init_cfg: dict, checkpoint: dict, model: nn.Module, name: str, remedy: str
) -> None:
    try:
        module = model.get_submodule(name)
    except AttributeError:  # a config need not be laid out as its model is
        return
    prefix = init_cfg.get('prefix')
    weights = _weights(checkpoint, prefix)
    differences = _norm_differences(module, weights)
    if name:
        children = dict(module.named_children())
        unknown = differences['unknown to the model']
        unknown[:] = [key for key in unknown if key.split('.')[0] in children]
    else:
        differences = _of_backbone(differences)
    if not any(differences.values()):
        return
    if prefix is None and name and any(key.startswith('backbone.') for key in weights):
        remedy = f'take the backbone of a whole model by --cfg-options {path}.prefix=backbone.'
    else:
        remedy = f'give weights of its depth and norm type, or {remedy}'
    raise CommandError(
        f'{path}.checkpoint: {init_cfg["checkpoint"]} does not fit the norm layers of '
        f'model.{name or "backbone"}: {_summary(differences)}; {remedy}'
    )


def check_start(cfg: Config) -> None:
    """Reads the checkpoint training starts from; one to resume must fit the model.

    One to fine-tune from must fit in the norm layers of the backbone alone: another
    number of classes is what it is for.

    Args:
        cfg (Config): The resolved config, to resume from its ``load_from``.

    Raises:
        CommandError: It is missing, broken, of another depth or norm, or cannot be resumed.
    """
    if not cfg.get('resume'):
        if cfg.get('load_from'):
            weights = _weights(read_checkpoint('load_from', cfg.load_from))
            differences = _of_backbone(_norm_differences(build_model(cfg), weights))
            if any(differences.values()):
                raise CommandError(
                    f'load_from: {cfg.load_from} does not fit the norm layers of the backbone in '
                    f'{cfg.filename}: {_summary(differences)}; give a checkpoint of its depth and '
                    'norm type, or one with BatchNorm'
                )
        return
    source = cfg.get('load_from')
    if source is None:
        return  # there is none yet: mmengine says so and starts anew
    checkpoint = read_checkpoint('--resume', source)
    if 'meta' not in checkpoint or 'iter' not in checkpoint['meta']:
        raise CommandError(
            f'--resume: {source} holds weights alone; start from it by '
            f'--cfg-options load_from={source}'
        )
    model = _check_fit('--resume', source, checkpoint, cfg)
    check_resumed(cfg, source, checkpoint, model)


def check_weights(cfg: Config) -> None:
    """Reads the checkpoint to be tested, which must fit the model.

    Args:
        cfg (Config): The resolved config, the checkpoint in ``load_from``.

    Raises:
        CommandError: It is missing, broken, or of another model.
    """
    checkpoint = read_checkpoint('checkpoint', cfg.load_from)
    _check_fit('checkpoint', cfg.load_from, checkpoint, cfg)


def read_checkpoint(key: str, source: str, remedy: str = 'give the path of a .pth file') -> dict:
    """The content of a checkpoint file or address.

    Args:
        key (str): What the user named it by.
        source (str): Path or address.
        remedy (str): What to do where there is none.

    Raises:
        CommandError: It is unreachable, missing or broken.
    """
    try:
        checkpoint = CheckpointLoader.load_checkpoint(source, map_location='cpu', logger='silent')
    except FileNotFoundError as error:
        raise CommandError(f'{key}: no file {source}; {remedy}') from error
    except KeyError as error:
        raise CommandError(f'{key}: {source} names no known model; {remedy}') from error
    except OSError as error:
        raise CommandError(f'{key}: cannot fetch {source} ({error}); {remedy}') from error
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CommandError(f'{key}: {source} is not a whole checkpoint ({reason})') from error
    if not isinstance(checkpoint, dict):
        raise CommandError(f'{key}: {source} holds a {type(checkpoint).__name__}, not weights')
    return checkpoint


def _weights(checkpoint: dict, prefix: Optional[str] = None) -> Dict[str, Tensor]:
    """The state dict in it, its names as mmengine gives them to the module to fill."""
    weights = checkpoint.get('state_dict', checkpoint)
    start = 'module.' if prefix is None else prefix.rstrip('.') + '.'
    inside = {name[len(start) :]: w for name, w in weights.items() if name.startswith(start)}
    if prefix is not None:
        return inside
    return {**{name: w for name, w in weights.items() if not name.startswith(start)}, **inside}


def build_model(cfg: Config) -> nn.Module:
    """The config's model, to look at; the random generators stay as they are."""
    with torch.random.fork_rng():
        return MODELS.build(copy.deepcopy(cfg.model))


def _check_fit(key: str, source: str, checkpoint: dict, cfg: Config) -> nn.Module:
    model = build_model(cfg)
    differences = _differences(model, _weights(checkpoint))
    if any(differences.values()):
        raise CommandError(
            f'{key}: {source} does not fit the model of {cfg.filename}: '
            f'{_summary(differences)}; give the config it was trained with'
        )
    return model


def _differences(module: nn.Module, weights: Dict[str, Tensor]) -> Differences:
    """Loads the weights, which lets the layers complete them; mmengine would print at length."""
    message = ''
    try:
        with _silent_layers():
            load_state_dict(module, weights, strict=True, logger='silent')
    except RuntimeError as error:
        message = str(error)
        if 'do not match exactly' not in message:
            raise
    sizes = re.findall(r'size mismatch for (\S+):', message)
    unexpected = re.findall(r'unexpected key in source state_dict: (.+)', message)
    missing = re.findall(r'missing keys in source state_dict: (.+)', message)
    return {
        'of another shape': sizes,
        'unknown to the model': [key for keys in unexpected for key in keys.split(', ')],
        'missing': [key for keys in missing for key in keys.split(', ')],
    }


@contextlib.contextmanager
def _silent_layers() -> Iterator[None]:
    # What they say of BatchNorm checkpoints belongs to the load that counts.
    logger = logging.getLogger('mmubn')
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _norm_differences(module: nn.Module, weights: Dict[str, Tensor]) -> Differences:
    """The differences in layers of BatchNorm's kind, the module's and those of ``weights``.

    Every block of a network with such layers has one, so that a block or a stage too many
    or too few shows here.
    """
    norms = {name for name, layer in module.named_modules() if isinstance(layer, _BatchNorm)}
    norms |= {name[: -len('.running_mean')] for name in weights if name.endswith('.running_mean')}
    return {
        what: [key for key in keys if key.rpartition('.')[0] in norms]
        for what, keys in _differences(module, weights).items()
    }


def _of_backbone(differences: Differences) -> Differences:
    return {
        what: [key for key in keys if key.startswith('backbone.')]
        for what, keys in differences.items()
    }


def _summary(differences: Differences) -> str:
    """A count and a first example of each kind."""
    return ', '.join(
        f'{len(keys)} keys {what} ({keys[0]})' for what, keys in differences.items() if keys
    )

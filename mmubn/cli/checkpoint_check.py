"""Checks that the checkpoints can be read, and fit the model."""

import os
import re
from typing import Dict, List, Optional

import torch
from mmengine.config import Config
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..walk import type_name, walk
from .cfg_options import option
from .class_check import dataset_classes
from .errors import CommandError
from .folder_check import first_shift
from .model import build_model
from .resume_check import check_resumed, no_log

# Keys of the state dict by the way in which they do not fit.
Differences = Dict[str, List[str]]


def check_pretrained(cfg: Config, model: nn.Module) -> None:
    """Reads the weights of every ``init_cfg``, fetching those that are not cached yet.

    Where they fill a module with layers of BatchNorm's kind, these must fit. What else
    differs passes, such as the classifier of a whole network or the stages above those
    that the module has. A norm layer that only the module has, as a plugin of ResNet may
    bring, is taken for one of a deeper network and refused.

    Args:
        cfg (Config): The resolved config.
        model (Module): Its model.

    Raises:
        CommandError: They are unreachable, missing, broken, or of another depth or norm.
    """
    for path, node in walk(cfg.model, 'model'):
        if type_name(node) not in ('Pretrained', 'PretrainedInit') or 'checkpoint' not in node:
            continue
        remedy = (
            f'train without by --cfg-options {path}=None, '
            f'or from a local file by --cfg-options {path}.checkpoint=FILE'
        )
        checkpoint = read_checkpoint(f'{path}.checkpoint', node['checkpoint'], remedy)
        place = re.fullmatch(r'model\.(?:(.+)\.)?init_cfg(?:\.\d+)?', path)
        if place is not None:
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


def check_start(cfg: Config, model: Optional[nn.Module] = None) -> None:
    """Reads the checkpoint training starts from; one to resume must fit the model.

    One to fine-tune from must fit in the norm layers of the backbone alone: another
    number of classes is what it is for.

    Args:
        cfg (Config): The resolved config, to resume from its ``load_from``.
        model (Module): Its model; built where it is not given, as by scripts of users.

    Raises:
        CommandError: It is missing, broken, of another depth or norm, cannot be resumed, or was
            trained with classes that were numbered otherwise.
    """
    model = build_model(cfg) if model is None else model
    if not cfg.get('resume'):
        if cfg.get('load_from'):
            check_load_from(cfg, model)
        return
    source = cfg.get('load_from')
    if source is None:
        return  # there is none yet: mmengine says so and starts anew
    checkpoint = read_checkpoint('--resume', source)
    if 'meta' not in checkpoint or 'iter' not in checkpoint['meta']:
        raise CommandError(
            f'--resume: {source} holds weights alone; start from it by '
            f'--cfg-options {option("load_from", source)}'
        )
    check_fit('--resume', source, checkpoint, cfg, model)
    _check_classes('--resume', source, checkpoint, cfg, 'train')
    check_resumed(cfg, source, checkpoint, model)


def check_load_from(cfg: Config, model: nn.Module) -> None:
    """Reads the weights to fine-tune from, which must fit in the norm layers of the backbone.

    Args:
        cfg (Config): The resolved config, the weights in ``load_from``.
        model (Module): Its model.

    Raises:
        CommandError: They are missing, broken, or of another depth or norm.
    """
    source = cfg.load_from
    weights = _weights(read_checkpoint('load_from', source))
    differences = _of_backbone(_norm_differences(model, weights))
    if not any(differences.values()):
        return
    remedy = 'give a checkpoint of its depth and norm type, or one with BatchNorm'
    backbone = getattr(model, 'backbone', None)
    children = {name for name, _ in backbone.named_children()} if backbone is not None else ()
    if any(name.split('.')[0] in children for name in weights):
        key = 'model.backbone.init_cfg'
        remedy = (
            f"its names lack 'backbone.', so it holds a backbone alone, as torchvision's and "
            f"timm's files do; load it by --cfg-options load_from=None {key}._delete_=True "
            f'{key}.type=Pretrained {option(f"{key}.checkpoint", source)}'
        )
    raise CommandError(
        f'load_from: {source} does not fit the norm layers of the backbone in '
        f'{cfg.filename}: {_summary(differences)}; {remedy}'
    )


def check_weights(cfg: Config, model: nn.Module) -> None:
    """Reads the checkpoint to be tested, which must fit the model and the test's classes.

    Args:
        cfg (Config): The resolved config, the checkpoint in ``load_from``.
        model (Module): Its model.

    Raises:
        CommandError: It is missing, broken, of another model, or numbers the classes otherwise.
    """
    checkpoint = read_checkpoint('checkpoint', cfg.load_from)
    check_fit('checkpoint', cfg.load_from, checkpoint, cfg, model)
    _check_classes('checkpoint', cfg.load_from, checkpoint, cfg, 'test')


def _check_classes(key: str, source: str, checkpoint: dict, cfg: Config, split: str) -> None:
    meta = (checkpoint.get('meta') or {}).get('dataset_meta') or {}
    trained = meta.get('classes') or meta.get('CLASSES') or ()
    for path, names in dataset_classes(cfg, split):
        shifted = first_shift(names, trained)
        if shifted is not None:
            work = dict(train='training', test='test')[split]
            raise CommandError(
                f"{key}: {source} was trained with '{shifted}' as class "
                f'{list(trained).index(shifted)}, and {path} has it as class '
                f'{list(names).index(shifted)}; give the {work} the classes of the checkpoint, '
                'in their order'
            )


def read_checkpoint(key: str, source: str, remedy: str = 'give the path of a .pth file') -> dict:
    """The content of a checkpoint file or address.

    Args:
        key (str): What the user named it by.
        source (str): Path or address.
        remedy (str): What to do where there is none.

    Raises:
        CommandError: It is unreachable, missing or broken.
    """
    if os.path.isdir(source):
        if key == '--resume':
            remedy = f'to go on with its last checkpoint give --work-dir {source} --resume'
        raise CommandError(f'{key}: {source} is a folder; {remedy}')
    try:
        checkpoint = CheckpointLoader.load_checkpoint(source, map_location='cpu', logger='silent')
    except FileNotFoundError as error:
        raise CommandError(f'{key}: no file {source}; {remedy}') from error
    except OSError as error:
        raise CommandError(f'{key}: cannot fetch {source} ({error}); {remedy}') from error
    except (ImportError, AttributeError) as error:  # it holds objects, or is at a special address
        if _is_scheme(source):
            raise CommandError(f'{key}: cannot fetch {source} ({error}); {remedy}') from error
        raise CommandError(
            f'{key}: {source} holds objects of code that is not installed here ({error}); on a '
            'machine that has it, save model.state_dict() to a file'
        ) from error
    except Exception as error:  # bytes that are no pickle may raise anything
        if isinstance(error, KeyError) and _is_scheme(source):
            raise CommandError(f'{key}: {source} names no known model; {remedy}') from error
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CommandError(f'{key}: {source} is not a whole checkpoint ({reason})') from error
    if not isinstance(checkpoint, dict):
        raise CommandError(f'{key}: {source} holds a {type(checkpoint).__name__}, not weights')
    if 'state_dict' not in checkpoint and not any(map(torch.is_tensor, checkpoint.values())):
        for name, value in checkpoint.items():
            if isinstance(value, dict) and any(map(torch.is_tensor, value.values())):
                raise CommandError(
                    f"{key}: {source} has its weights under '{name}', and mmengine looks under "
                    f"'state_dict'; save torch.load('{source}')['{name}'] to a file of its own"
                )
    return checkpoint


def _is_scheme(source: str) -> bool:
    """Whether it is an address that a library of its own resolves, as ``torchvision://`` is."""
    return '://' in source and not source.startswith('http')


def _weights(checkpoint: dict, prefix: Optional[str] = None) -> Dict[str, Tensor]:
    """The state dict in it, its names as mmengine gives them to the module to fill."""
    weights = checkpoint.get('state_dict', checkpoint)
    start = 'module.' if prefix is None else prefix.rstrip('.') + '.'
    inside = {name[len(start) :]: w for name, w in weights.items() if name.startswith(start)}
    if prefix is not None:
        return inside
    return {**{name: w for name, w in weights.items() if not name.startswith(start)}, **inside}


def check_fit(key: str, source: str, checkpoint: dict, cfg: Config, model: nn.Module) -> None:
    """Loads the weights of a checkpoint, which must be those of the model.

    Args:
        key (str): What the user named the checkpoint by.
        source (str): Path or address of the checkpoint.
        checkpoint (dict): Its content.
        cfg (Config): The resolved config.
        model (Module): Its model.

    Raises:
        CommandError: Keys are missing, unknown, or of another shape.
    """
    differences = _differences(model, _weights(checkpoint))
    if any(differences.values()):
        raise CommandError(
            f'{key}: {source} does not fit the model of {cfg.filename}: '
            f'{_summary(differences)}; give the config it was trained with'
        )


def _differences(module: nn.Module, weights: Dict[str, Tensor]) -> Differences:
    """Loads the weights, which lets the layers complete them."""
    sizes: List[str] = []
    with no_log():
        try:
            missing, unknown = module.load_state_dict(weights, strict=False)
        except RuntimeError:  # another shape is refused even so
            own = module.state_dict()
            sizes = [k for k in own if k in weights and own[k].shape != weights[k].shape]
            if not sizes:
                raise
            fitting = {key: value for key, value in weights.items() if key not in sizes}
            missing, unknown = module.load_state_dict(fitting, strict=False)
    return {
        'of another shape': sizes,
        'unknown to the model': unknown,
        'missing': [key for key in missing if key not in sizes],
    }


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

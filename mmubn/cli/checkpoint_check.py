"""Checks that the checkpoints can be read, and fit the model."""

import copy
import pickle
import re

import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.runner import CheckpointLoader, find_latest_checkpoint
from mmengine.runner import load_checkpoint as load_into

from .errors import CommandError
from .walk import walk


def check_pretrained(cfg: Config) -> None:
    """Reads the weights of every ``init_cfg``, fetching those that are not cached yet.

    Args:
        cfg (Config): The resolved config.

    Raises:
        CommandError: They are unreachable, missing or broken.
    """
    for path, node in walk(cfg.model, 'model'):
        if node.get('type') in ('Pretrained', 'PretrainedInit') and 'checkpoint' in node:
            key = f'{path}.checkpoint'
            remedy = (
                f'train without by --cfg-options {path}=None, '
                f'or from a local file by --cfg-options {key}=FILE'
            )
            _read(key, node['checkpoint'], remedy)


def check_start(cfg: Config) -> None:
    """Reads the checkpoint training starts from; one to resume must fit the model.

    One to fine-tune from need not fit: another number of classes is what it is for.

    Args:
        cfg (Config): The resolved config.

    Raises:
        CommandError: It is missing, broken, or cannot be resumed.
    """
    if not cfg.get('resume'):
        if cfg.get('load_from'):
            _read('load_from', cfg.load_from, 'give the path of a .pth file')
        return
    source = cfg.get('load_from') or find_latest_checkpoint(cfg.work_dir)
    if source is None:
        return  # mmengine says so and starts anew
    checkpoint = _read('--resume', source, 'give the path of a .pth file')
    if 'meta' not in checkpoint or 'iter' not in checkpoint['meta']:
        raise CommandError(
            f'--resume: {source} holds weights alone; start from it by '
            f'--cfg-options load_from={source}'
        )
    _check_fit('--resume', source, cfg)


def check_weights(cfg: Config) -> None:
    """Reads the checkpoint to be tested, which must fit the model.

    Args:
        cfg (Config): The resolved config, the checkpoint in ``load_from``.

    Raises:
        CommandError: It is missing, broken, or of another model.
    """
    _read('checkpoint', cfg.load_from, 'give the path of a .pth file')
    _check_fit('checkpoint', cfg.load_from, cfg)


def _read(key: str, source: str, remedy: str) -> dict:
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


def _check_fit(key: str, source: str, cfg: Config) -> None:
    """Loads the checkpoint into a model of its own, which mmengine would do with a long print."""
    with torch.random.fork_rng():
        model = MODELS.build(copy.deepcopy(cfg.model))
    try:
        load_into(model, source, map_location='cpu', strict=True, logger='silent')
    except RuntimeError as error:
        if 'do not match exactly' not in str(error):
            raise
        raise CommandError(
            f'{key}: {source} does not fit the model of {cfg.filename}: '
            f'{_summary(str(error))}; give the config it was trained with'
        ) from error


def _summary(message: str) -> str:
    """Shortens mmengine's list of differences to a count and a first example of each kind."""
    sizes = re.findall(r'size mismatch for (\S+):', message)
    unexpected = re.findall(r'unexpected key in source state_dict: (.+)', message)
    missing = re.findall(r'missing keys in source state_dict: (.+)', message)
    differences = (
        ('of another shape', sizes),
        ('unknown to the model', [key for keys in unexpected for key in keys.split(', ')]),
        ('missing', [key for keys in missing for key in keys.split(', ')]),
    )
    return ', '.join(f'{len(keys)} keys {what} ({keys[0]})' for what, keys in differences if keys)

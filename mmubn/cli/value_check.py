"""Checks numbers and names in a config that are refused after the work directory is made."""

import inspect
import logging
import math
import numbers
from typing import Any

from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.device import get_device
from mmengine.registry import DATASETS
from torch import nn

from ..walk import type_name, walk
from .errors import CommandError
from .lookup import find_class


def check_values(cfg: Config, model: nn.Module) -> None:
    """Looks at what Runner, the data loaders and the loops refuse once they are built.

    Args:
        cfg (Config): The resolved config.
        model (Module): Not used.

    Raises:
        CommandError: The first value that cannot be.
    """
    for split in ('train', 'val', 'test'):
        loader = cfg.get(f'{split}_dataloader') or {}
        _check_loader(f'{split}_dataloader', loader)
        for key, node in walk(loader.get('dataset'), f'{split}_dataloader.dataset'):
            if node.get('indices') is not None:
                _check_indices(key, node)
    lengths = cfg.get('train_cfg') or {}
    for key in ('max_epochs', 'max_iters', 'val_interval'):
        if lengths.get(key) is not None:
            value = lengths[key]
            _check_count(f'train_cfg.{key}', _whole(value), least=1)  # the loops take 90e3
    seed = (cfg.get('randomness') or {}).get('seed')
    if seed is not None:
        _check_count('randomness.seed', seed, least=0)
        if seed >= 2**32:
            raise CommandError(f'randomness.seed: must be below 2**32, got {seed}')
    level = cfg.get('log_level', 'INFO')
    if isinstance(level, str) and not isinstance(logging.getLevelName(level), int):
        raise CommandError(
            f'log_level: there is no level {level!r}; take DEBUG, INFO, WARNING or ERROR'
        )
    if cfg.get('load_from') == '':
        raise CommandError('load_from: names no file; write None to start without a checkpoint')


def check_training(cfg: Config, model: nn.Module) -> None:
    """Looks at what the optimizer and its wrapper refuse.

    Args:
        cfg (Config): The resolved config.
        model (Module): Not used.

    Raises:
        CommandError: A setting of the optimizer that is no number from 0 on, steps over a number
            of batches that is none, mixed precision without a GPU, or no batch size to scale from.
    """
    wrapper = cfg.get('optim_wrapper') or {}
    for key in ('lr', 'momentum', 'weight_decay'):
        value = (wrapper.get('optimizer') or {}).get(key)
        if value is not None:
            _check_number(f'optim_wrapper.optimizer.{key}', value)
    if wrapper.get('accumulative_counts') is not None:
        _check_count(
            'optim_wrapper.accumulative_counts', _whole(wrapper['accumulative_counts']), least=1
        )
    if type_name(wrapper).endswith('AmpOptimWrapper') and get_device() == 'cpu':
        raise CommandError(
            'optim_wrapper.type=AmpOptimWrapper needs a GPU; on a CPU, train without --amp, with '
            '--cfg-options optim_wrapper.type=OptimWrapper'
        )
    scaling = cfg.get('auto_scale_lr') or {}
    if scaling.get('enable') and not scaling.get('base_batch_size'):
        raise CommandError(
            'auto_scale_lr.enable=True: the config has no auto_scale_lr.base_batch_size, the batch '
            'size that its learning rate is for'
        )


def _check_loader(key: str, loader: dict) -> None:
    if loader.get('batch_size') is not None:
        _check_count(f'{key}.batch_size', loader['batch_size'], least=1)
    workers = loader.get('num_workers', 0)
    _check_count(f'{key}.num_workers', workers, least=0)
    if workers:
        return
    for name, off in (('persistent_workers', False), ('prefetch_factor', None)):
        if loader.get(name):
            raise CommandError(
                f'{key}.num_workers=0: {name}={loader[name]} needs workers; give --cfg-options '
                f'{key}.{name}={off} too'
            )


def _check_indices(key: str, node: dict) -> None:
    kind = find_class(node, DATASETS)
    if not inspect.isclass(kind) or not issubclass(kind, BaseDataset):
        return  # what it means there is not known
    value = node['indices']
    numbered = isinstance(value, (list, tuple)) and all(isinstance(i, int) for i in value)
    if not value or not (numbered or isinstance(value, int)):
        raise CommandError(
            f'{key}.indices: must be how many images are taken, of the last ones a negative '
            f'number, or a list of their numbers, got {value!r}; leave it out to take all'
        )


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _check_count(key: str, value: Any, least: int) -> None:
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < least:
        raise CommandError(f'{key}: must be an integer from {least} on, got {value!r}')


def _check_number(key: str, value: Any) -> None:
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not 0 <= value < math.inf:
        point = '; write decimals with a point' if isinstance(value, (list, tuple)) else ''
        raise CommandError(f'{key}: must be a number from 0 on, got {value!r}{point}')

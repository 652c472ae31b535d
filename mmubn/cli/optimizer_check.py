"""Checks what the optimizer and its schedulers refuse once they are built."""

import inspect
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import OPTIMIZERS, PARAM_SCHEDULERS
from torch import nn
from torch.optim import Optimizer

from ..walk import each
from .errors import CommandError, user_error
from .lookup import HOSTS, find_class


def check_optimizer(cfg: Config, model: nn.Module) -> None:
    """Builds the optimizer and its schedulers once, for a parameter of its own.

    Of several optimizers, of one that a constructor makes, and of types that are neither torch's
    nor the hosts', nothing is judged.

    Args:
        cfg (Config): The resolved config; its default scope must be in force.
        model (Module): Not used.

    Raises:
        CommandError: One refuses an argument.
    """
    wrapper = cfg.get('optim_wrapper') or {}
    settings = wrapper.get('optimizer')
    if not isinstance(settings, dict) or wrapper.get('constructor') is not None:
        return
    kind = find_class(settings, OPTIMIZERS)
    # Those of torch.distributed talk to the other processes.
    if not inspect.isclass(kind) or not kind.__module__.startswith('torch.optim.'):
        return
    parameter = nn.Parameter(torch.zeros(1, 1))
    optimizer = _build(
        'optim_wrapper.optimizer', kind, OPTIMIZERS, settings, dict(params=[parameter])
    )
    for path, node in each(cfg.get('param_scheduler'), 'param_scheduler'):
        _check_scheduler(path, node, cfg, optimizer)


def _check_scheduler(path: str, node: Any, cfg: Config, optimizer: Optimizer) -> None:
    if node is None:
        raise CommandError(f'{path}: must be a dict, got None; leave it out')
    kind = find_class(node, PARAM_SCHEDULERS) if isinstance(node, dict) else None
    if not inspect.isclass(kind) or not kind.__module__.startswith(HOSTS):
        return
    given = dict(optimizer=optimizer, epoch_length=1)
    unit = 'max_epochs' if node.get('by_epoch', True) else 'max_iters'
    if (cfg.get('train_cfg') or {}).get(unit) is not None:  # mmengine's default
        given['end'] = cfg.train_cfg[unit]
    _build(path, kind, PARAM_SCHEDULERS, node, given)


def _build(path: str, kind: type, registry: Any, node: dict, given: dict) -> Any:
    refused = AssertionError, KeyError, TypeError, ValueError, ZeroDivisionError
    with user_error(*refused, of=f'{path}: {kind.__name__}'):
        return registry.build(dict(node), default_args=given)

"""Says what a resumed training takes from its checkpoint in place of the config."""

import copy
import logging
import math
import re
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List

from mmengine.config import Config
from mmengine.dist import get_world_size
from mmengine.optim import build_optim_wrapper
from torch import nn

from ..walk import each, type_name
from .cfg_options import option
from .errors import CommandError, warn

# Not settings of the optimizer's mathematics.
_NO_SETTINGS = {'params', 'foreach', 'fused', 'capturable', 'differentiable'}


def check_resumed(cfg: Config, source: str, checkpoint: dict, model: nn.Module) -> None:
    """Compares optimizer and schedule of a checkpoint with those that the config asks for.

    mmengine restores both as they were saved, with learning rate, momentum, milestones and
    all, so that what the config changes has no effect. That is told in one line on stderr, as
    is a checkpoint without the state of the optimizer.

    Args:
        cfg (Config): The resolved config.
        source (str): Path or address of the checkpoint.
        checkpoint (dict): Its content.
        model (nn.Module): The config's model.

    Raises:
        CommandError: The state is empty, of another optimizer, or of other groups of parameters.
    """
    start = option('load_from', source)
    remedy = f'start from its weights by --cfg-options {start}, without --resume'
    differences: List[str] = []
    if 'optimizer' not in checkpoint:
        warn(
            f'--resume: {source} holds no state of the optimizer: it starts anew, without momentum'
        )
    elif not checkpoint['optimizer']:
        raise CommandError(
            f'--resume: in {source} the state of the optimizer is {checkpoint["optimizer"]!r}, '
            f'which cannot be resumed; {remedy}'
        )
    saved = checkpoint.get('optimizer', {})
    # Several optimizers, or a wrapper with a constructor of its own, lay theirs out otherwise.
    if 'param_groups' in saved and 'optimizer' in (cfg.get('optim_wrapper') or {}):
        differences += _optimizer_differences(cfg, source, checkpoint, model, remedy)
        differences += _schedule_differences(cfg, checkpoint)
    if differences:
        warn(
            f'--resume: optimizer and schedule are those of {source}: '
            f'{"; ".join(differences)}; to train with those of the config, {remedy}'
        )
    for unit in ('epoch', 'iter'):
        length = (cfg.get('train_cfg') or {}).get(f'max_{unit}s')
        done = checkpoint['meta'].get(unit, 0)
        if length is not None and done >= length:
            warn(
                f'--resume: {source} has finished {unit} {done}, and '
                f'train_cfg.max_{unit}s={length}: nothing is left to train'
            )


def _optimizer_differences(
    cfg: Config, source: str, checkpoint: dict, model: nn.Module, remedy: str
) -> List[str]:
    saved = checkpoint['optimizer']['param_groups']
    key = 'optim_wrapper.optimizer'
    kind = type_name(cfg.optim_wrapper.optimizer)
    groups = _groups(cfg, model)
    of_saved, of_config = (_settings(found[0]) for found in (saved, groups))
    before = _saved_type(checkpoint)
    # Each version of torch may add settings to an optimizer, but takes none away.
    if before not in ('', kind) or (of_saved - of_config and of_config - of_saved):
        raise CommandError(
            f'{key}.type: {source} holds the state of {before or "another optimizer"}, '
            f'not of {kind}; resume with {before or "that"}, or {remedy}'
        )
    if [len(g['params']) for g in groups] != [len(g['params']) for g in saved]:
        raise CommandError(
            f'{key}: {source} has {len(saved)} groups of {sum(len(g["params"]) for g in saved)} '
            f'parameters, the config {len(groups)} of {sum(len(g["params"]) for g in groups)} '
            f'(optim_wrapper.paramwise_cfg, frozen layers); resume with the same, or {remedy}'
        )
    differences = {}
    for group, other in zip(groups, saved):
        for name in sorted(of_saved & of_config):
            # A schedule keeps what it started from.
            there = other.get(f'initial_{name}', other[name])
            if name not in differences and not _same(group[name], there):
                differences[name] = f'{key}.{name} is {_shown(there)}, not {_shown(group[name])}'
    return list(differences.values())


def _groups(cfg: Config, model: nn.Module) -> List[Dict[str, Any]]:
    """The parameter groups that the config gives, with the learning rate as mmengine scales it."""
    wanted = ('optimizer', 'constructor', 'paramwise_cfg')  # nothing that needs a GPU
    settings = {key: value for key, value in cfg.optim_wrapper.items() if key in wanted}
    with no_log():  # mmengine tells the settings of every parameter
        wrapper = build_optim_wrapper(model, copy.deepcopy(settings))
    groups = wrapper.optimizer.param_groups
    scaling = cfg.get('auto_scale_lr') or {}
    if scaling.get('enable'):
        ratio = get_world_size() * cfg.train_dataloader.batch_size / scaling['base_batch_size']
        for group in groups:
            group['lr'] *= ratio
    return groups


@contextmanager
def no_log() -> Iterator[None]:
    """In which nobody logs, up to warnings: what a check builds or loads, Runner will again."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)


def _settings(group: Dict[str, Any]) -> set:
    return {name for name in group if name not in _NO_SETTINGS and not name.startswith('initial_')}


def _saved_type(checkpoint: dict) -> str:
    """The optimizer's type in the config that mmengine keeps in a checkpoint, or ''."""
    text = checkpoint['meta'].get('cfg') or ''
    inside = r'(?:[^()]|\([^()]*\))*?'
    match = re.search(rf"\boptimizer=dict\({inside}\btype='(?:\w+\.)*(\w+)'", text)
    return match[1] if match else ''


def _schedule_differences(cfg: Config, checkpoint: dict) -> List[str]:
    schedulers = list(each(cfg.get('param_scheduler'), 'param_scheduler'))
    saved = checkpoint.get('param_schedulers') or []
    if not isinstance(saved, list) or len(schedulers) != len(saved):
        return [f'param_scheduler has {len(saved)} parts there, {len(schedulers)} in the config']
    differences = []
    for (path, scheduler), state in zip(schedulers, saved):
        for name, value in scheduler.items():
            # Epochs that mmengine turned into iterations cannot be compared.
            if name not in state or scheduler.get('convert_to_iter_based'):
                continue
            there = state[name]
            if hasattr(there, 'elements'):  # milestones, kept with their counts
                there = sorted(there.elements())
            if not _same(value, there):
                differences.append(f'{path}.{name} is {_shown(there)}, not {_shown(value)}')
    return differences


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return math.isclose(a, b)
    return a == b


def _shown(value: Any) -> str:
    return f'{value:g}' if isinstance(value, float) else str(value)

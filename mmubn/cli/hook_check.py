"""Checks the arguments of hooks, which mmengine builds after the work directory."""

import inspect
from typing import Dict

from mmengine.config import Config
from mmengine.hooks import CheckpointHook, LoggerHook
from mmengine.registry import HOOKS
from torch import nn

from ..condensation import CondensationRecorder
from ..hooks import CondensationHook
from ..walk import hook_nodes
from .errors import CommandError, user_error
from .lookup import find_class

_OTHERS = (CheckpointHook, LoggerHook)  # every config has them, and they only keep their arguments


def check_hooks(cfg: Config, model: nn.Module) -> None:
    """Builds each hook of the project once, and looks for the layers that it names.

    Of mmengine's, those that log and save are built, too.

    Args:
        cfg (Config): The resolved config; its default scope must be in force.
        model (Module): Its model.

    Raises:
        CommandError: A hook refuses an argument, finds no layer to measure, or is there twice.
    """
    places: Dict[type, str] = {}
    for path, node in hook_nodes(cfg):
        kind = find_class(node, HOOKS) if isinstance(node, dict) else None
        if not inspect.isclass(kind):
            continue
        ours = kind.__module__.startswith('mmubn.')
        if not ours and kind not in _OTHERS:
            continue
        other = places.setdefault(kind, path)
        if ours and other != path:
            raise CommandError(
                f'{path}: a second {kind.__name__} beside {other}, and both would act; take one '
                'away, such as that of a base config, by writing the whole list of custom_hooks'
            )
        with user_error(AssertionError, KeyError, TypeError, ValueError, of=path):
            hook = HOOKS.build({key: value for key, value in node.items() if key != 'priority'})
            if isinstance(hook, CondensationHook):
                CondensationRecorder(model, hook.layers)

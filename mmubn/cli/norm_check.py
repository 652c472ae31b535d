"""Checks that every norm layer a config asks for can be built."""

from typing import Iterator, Tuple

from mmcv.cnn import build_norm_layer
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn

from .. import layers
from ..layers import SYNCHRONISED
from ..walk import walk
from .errors import CommandError, user_error
from .lookup import did_you_mean, find_class, near_type


def check_norms(cfg: Config) -> None:
    """Builds one layer of every ``norm_cfg`` in the model.

    Args:
        cfg (Config): The resolved config; its default scope must be in force.

    Raises:
        CommandError: The type is left out or unknown, or refuses a setting.
    """
    for path, node in walk(cfg.model, 'model'):
        is_layer = path.endswith('norm_cfg') and not path.endswith('img_norm_cfg')
        if is_layer and node and 'type' not in node:
            raise CommandError(f"{path}: type is left out; write dict(type='UBN', ...)")
    for path, norm in norm_cfgs(cfg):
        layer = find_class(norm, MODELS)
        if layer is None:
            raise CommandError(
                f"{path}: no norm layer is registered as '{norm['type']}'{_hint(norm)}"
            )
        if layer is nn.GroupNorm and 'num_groups' not in norm:
            raise CommandError(f'{path}: num_groups is left out; {norm["type"]} needs it')
        with user_error(RuntimeError, TypeError, ValueError, of=path):
            build_norm_layer(norm, norm.get('num_groups', 1))


def norm_cfgs(cfg: Config) -> Iterator[Tuple[str, dict]]:
    """Every ``norm_cfg`` in the model, with its dotted path."""
    for path, node in walk(cfg.model, 'model'):
        if path.endswith('norm_cfg') and 'type' in node:
            yield path, node


def _hint(norm: dict) -> str:
    asked = norm['type'].upper()
    ours = [name for name in layers.__all__ if name.upper() in asked.replace('SYNC', '')]
    if ours and 'SYNC' in asked:
        twins = [twin.__name__ for kind, twin in SYNCHRONISED.items() if kind.__name__ in ours]
        if not twins:
            return (
                f'; there is no synchronised {ours[0]}: '
                f"type='{ours[0]}' has each process's own statistics"
            )
        ours = twins
    return did_you_mean(norm['type'], ours, cutoff=0) or near_type(norm, MODELS)

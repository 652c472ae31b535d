"""Builds the model of a config, and says what its parts refuse."""

import copy
import os
import re
import traceback
from typing import Tuple

import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn

from ..walk import walk
from .errors import CommandError
from .lookup import find_class


def build_model(cfg: Config) -> nn.Module:
    """The config's model, to look at; the random generators stay as they are.

    Raises:
        CommandError: A part of it lacks an argument or its type, or does not know one.
    """
    settings = copy.deepcopy(cfg.model)
    if cfg.get('data_preprocessor') is not None:  # as mmengine's Runner
        settings.setdefault('data_preprocessor', copy.deepcopy(cfg.data_preprocessor))
    try:
        with torch.random.fork_rng(devices=[]):  # by default it wakes every GPU
            return MODELS.build(settings)
    except TypeError as error:
        parts = walk(settings, 'model')
        empty = [path for path, node in parts if node.get('norm_cfg', '') is None]
        if empty and 'cfg must be a dict' in str(error):
            raise CommandError(
                f"{empty[0]}.norm_cfg: None is no norm layer; write dict(type='UBN', ...)"
            ) from error
        if 'argument' not in str(error):
            raise
        raise CommandError(f'{_refusing(cfg, str(error))}: {error}') from error
    except (AssertionError, KeyError, ValueError) as error:
        reason = (str(error.args[0]) if error.args else type(error).__name__).splitlines()[0]
        if 'must contain the key "type"' in reason:
            raise CommandError(f'model: a type is left out: {reason}') from error
        path, place = _raised_in(error, cfg)
        raise CommandError(f'{path}: {reason} ({place})') from error


def _raised_in(error: Exception, cfg: Config) -> Tuple[str, str]:
    """The path of the part of the model whose constructor raised, and the place in the code."""
    path = place = 'model'
    for frame, line in traceback.walk_tb(error.__traceback__):
        place = f'{"/".join(frame.f_code.co_filename.split(os.sep)[-2:])}, line {line}'
        kind = type(frame.f_locals.get('self'))
        if issubclass(kind, nn.Module):
            parts = walk(cfg.model, 'model')
            path = next((at for at, node in parts if find_class(node, MODELS) is kind), path)
    return path, place


def _refusing(cfg: Config, message: str) -> str:
    """The path of the part of the model that a ``TypeError`` of its constructor is about."""
    build, names = message.partition('.')[0], re.findall(r"'(\w+)'", message)
    for path, node in walk(cfg.model, 'model'):
        kind = find_class(node, MODELS)
        builds = any(base.__name__ == build for base in getattr(kind, '__mro__', ()))
        if builds and names and ('unexpected' in message) == (names[0] in node):
            return path
    return 'model'

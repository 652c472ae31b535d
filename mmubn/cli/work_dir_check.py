"""Checks that the work directory can take what is written into it."""

import errno
import os
import tempfile
from typing import Optional

from mmengine.config import Config
from torch import nn

from ..writing import nearest_existing
from .checkpoint_check import build_model
from .errors import CommandError
from .walk import walk

_OTHER = 'give another folder by --work-dir'


def check_work_dir(cfg: Config, model: Optional[nn.Module] = None) -> None:
    """Writes where the checkpoints will be, and reserves the room for one of them.

    What is written goes away at once. A folder that does not exist yet is judged by
    the nearest one above it.

    Args:
        cfg (Config): The resolved config.
        model (Module): Its model; built where it is not given.

    Raises:
        CommandError: Nothing can be written there, or no file of a checkpoint's size.
    """
    hook = cfg.get('default_hooks', {}).get('checkpoint') or {}
    folders = {'work_dir': cfg.work_dir}
    if hook.get('out_dir') and '://' not in hook['out_dir']:
        folders['default_hooks.checkpoint.out_dir'] = hook['out_dir']
    size = _checkpoint_bytes(cfg, build_model(cfg) if model is None else model)
    for key, folder in folders.items():
        _reserve(key, folder, size)


def check_results(cfg: Config, model: Optional[nn.Module] = None) -> None:
    """Writes where an evaluation will: the work directory, and what its metrics name.

    Args:
        cfg (Config): The resolved config.
        model (Module): Not needed.

    Raises:
        CommandError: Nothing can be written there.
    """
    check_writable('work_dir', cfg.work_dir, _OTHER)
    for path, node in walk(cfg.get('test_evaluator'), 'test_evaluator'):
        for name in ('out_file_path', 'outfile_prefix'):
            if node.get(name):
                check_output(f'{path}.{name}', node[name])


def check_output(key: str, file: str) -> None:
    """Whether a file can be written; its folder may be missing.

    Args:
        key (str): What the user named it by.
        file (str): Its path.

    Raises:
        CommandError: It is a folder, may not be changed, or nothing can be written beside it.
    """
    if os.path.isdir(file):
        raise CommandError(f'{key}: {file} is a folder; name a file')
    if os.path.exists(file) and not os.access(file, os.W_OK):
        raise CommandError(f'{key}: {file} may not be changed; name another file')
    check_writable(key, os.path.dirname(file))


def check_writable(key: str, folder: str, remedy: str = 'name another place') -> None:
    """Writes a file into the folder, or the nearest above it that exists, and takes it away.

    Args:
        key (str): What the user named the folder by.
        folder (str): Its path.
        remedy (str): What to do where it fails.

    Raises:
        CommandError: Nothing can be written there.
    """
    _reserve(key, folder, 1, remedy)


def _reserve(key: str, folder: str, size: int, remedy: str = _OTHER) -> None:
    existing = nearest_existing(folder)
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise CommandError(
                f'{key}: no room in {existing} for a checkpoint of {size / 1e6:.1f} MB '
                f'({error.strerror}); {remedy}'
            ) from error
        raise CommandError(
            f'{key}: cannot write to {existing} ({error.strerror}); {remedy}'
        ) from error


def _checkpoint_bytes(cfg: Config, model: nn.Module) -> int:
    """The model's bytes and those of the optimizer's state, as far as its type tells."""
    optimizer = (cfg.get('optim_wrapper') or {}).get('optimizer', {})
    states = 2 if 'Adam' in str(optimizer.get('type')) else bool(optimizer.get('momentum'))
    weights = sum(value.nbytes for value in model.state_dict().values())
    return weights + states * sum(p.nbytes for p in model.parameters() if p.requires_grad)

"""Finds the checkpoint that a training goes on from."""

from pathlib import Path
from typing import Any, Dict, List

from mmengine.config import Config

from ..runs import checkpoints, last_checkpoint, noted_checkpoint
from .checkpoint_check import read_checkpoint
from .errors import CommandError, warn


def resume_settings(cfg: Config, newest: bool = False) -> Dict[str, Any]:
    """What a resumed training takes from its checkpoint, for ``cfg.merge_from_dict``.

    ``load_from``: the last checkpoint of the work directory, or, where that one is
    missing or cut short, the newest that is whole, which is told on stderr.
    ``randomness.seed``: that of the checkpoint where the config has none, since samplers
    are built before mmengine reads it. Where there is no checkpoint yet, ``resume`` is
    False, so that the training starts from the weights of the config's ``load_from``.

    Args:
        cfg (Config): The resolved config, with ``resume=True``.
        newest (bool): Look in the work directory, whatever ``load_from`` is. Default: False,
            which resumes from ``load_from`` where there is one.

    Raises:
        CommandError: The checkpoint to go on from cannot be read, or none is whole.
    """
    settings, source = {}, cfg.get('load_from')
    if source and not newest:
        checkpoint = read_checkpoint('--resume', source)
    else:
        source, checkpoint = _newest_whole(cfg.work_dir)
        if source is None:
            return {'resume': False}  # else mmengine would resume from load_from
        settings['load_from'] = source
    seed = checkpoint.get('meta', {}).get('seed')
    if seed is not None and (cfg.get('randomness') or {}).get('seed') is None:
        settings['randomness.seed'] = seed
    return settings


def _newest_whole(work_dir: str) -> tuple:
    """Path and content, or twice None."""
    named = noted_checkpoint(work_dir)
    if '://' in named:  # CheckpointHook(out_dir='s3://...')
        return named, read_checkpoint('--resume', named)
    last = last_checkpoint(work_dir)
    broken: List[str] = []
    for path in checkpoints(work_dir):
        try:
            checkpoint = read_checkpoint('--resume', str(path))
        except CommandError as error:
            broken.append(str(error))
            continue
        if path != last and 'optimizer' not in checkpoint:
            continue  # no checkpoint of a training
        for line in broken:
            warn(f'{line}: resuming from {path}')
        return str(path), checkpoint
    note = Path(work_dir) / 'last_checkpoint'
    if note.exists():
        reason = broken[0] if broken else f'--resume: {note} names no checkpoint'
        raise CommandError(f'{reason}; no checkpoint in {work_dir} is whole: start anew')
    for line in broken:
        warn(f'{line}: starting anew')
    return None, None

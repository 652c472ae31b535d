"""Errors of the user's making, told in one line."""

import functools
import os
import sys
from typing import Callable, Optional, Sequence

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record


class CommandError(Exception):
    """Bad input: the message names the key or file and says what to do."""


def listed(names: Sequence[str], most: int = 6) -> str:
    """Names in a message: ``'a', 'b' and 78 more``."""
    text = ', '.join(repr(name) for name in names[:most])
    return text + (f' and {len(names) - most} more' if len(names) > most else '') or 'none'


def command(main: Callable[[Optional[Sequence[str]]], None]) -> Callable[..., None]:
    """Ends ``main`` with ``error: ...`` on stderr and exit code 1 on a :class:`CommandError`.

    Any other exception keeps its traceback, which torchrun repeats as the one that ended
    the job. Of several processes the first one speaks.

    Args:
        main: The command; takes the arguments after the program's name, None for
            those of the process.
    """

    @functools.wraps(main)
    def wrapper(argv: Optional[Sequence[str]] = None) -> None:
        try:
            main(argv)
        except CommandError as error:
            rank = os.environ.get('RANK') or os.environ.get('SLURM_PROCID') or '0'
            if rank == '0':
                print(f'error: {error}', file=sys.stderr)
            _leave_group()
            sys.exit(1)
        _leave_group()

    return record(wrapper) if 'TORCHELASTIC_ERROR_FILE' in os.environ else wrapper


def _leave_group() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()

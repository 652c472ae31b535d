"""Errors of the user's making, told in one line."""

import functools
import os
import sys
import time
from contextlib import contextmanager
from typing import Callable, Iterator, Optional, Sequence, Type
from urllib.error import URLError

from torch.distributed.elastic.multiprocessing.errors import record

from .leave_group import leave_group

_DOWNLOAD = 'a download failed; without it, give data by --data-root and weights as a file'
# How much later than the others the process that tells an error may get there.
_LAG_S = 60


class CommandError(Exception):
    """Bad input: the message names the key or file and says what to do."""


def listed(names: Sequence[str]) -> str:
    """Names in a message, at most six: ``'a', 'b', 'c', 'd', 'e', 'f' and 78 more``."""
    text = ', '.join(map(repr, names[:6]))
    return text + (f' and {len(names) - 6} more' if len(names) > 6 else '') or 'none'


def one_line(error: BaseException) -> str:
    """What an exception says, in one line and without the quotes of a KeyError."""
    said = error.args[0] if isinstance(error, KeyError) and error.args else error
    return ' '.join(str(said).split())


@contextmanager
def user_error(*kinds: Type[Exception], of: str = '') -> Iterator[None]:
    """In which exceptions of these kinds are of the user's making: told by :class:`CommandError`.

    Args:
        *kinds: What is raised by code that knows no command line.
        of (str): What is at fault, such as a key of the config, where they do not say it.
    """
    try:
        yield
    except kinds as error:
        raise CommandError(f'{of}: {one_line(error)}' if of else one_line(error)) from error


def warn(text: str) -> None:
    """Prints ``warning: ...`` on stderr; of several processes the first one speaks."""
    if _is_first_process():
        print(f'warning: {text}', file=sys.stderr)


def _is_first_process() -> bool:
    return (os.environ.get('RANK') or os.environ.get('SLURM_PROCID') or '0') == '0'


def _is_first_of_machine() -> bool:
    """Of those that a launcher started, which differ in what their machines have."""
    return (os.environ.get('LOCAL_RANK') or os.environ.get('SLURM_LOCALID')) == '0'


def command(main: Callable[[Optional[Sequence[str]]], None]) -> Callable[..., None]:
    """Ends ``main`` with ``error: ...`` on stderr and exit code 1 on a :class:`CommandError`.

    So does a download that fails, which the libraries begin by themselves.

    Any other exception keeps its traceback, which torchrun repeats as the one that ended
    the job. Of several processes the first one of each machine speaks. The others wait to be
    ended: torchrun and srun end all with the first that fails, which must have spoken.

    Args:
        main: The command; takes the arguments after the program's name, None for
            those of the process.
    """

    @functools.wraps(main)
    def wrapper(argv: Optional[Sequence[str]] = None) -> None:
        try:
            with user_error(URLError, of=_DOWNLOAD):
                main(argv)
        except CommandError as error:
            speaks = _is_first_process() or _is_first_of_machine()
            if speaks:
                print(f'error: {error}', file=sys.stderr, flush=True)
            leave_group()
            if not speaks:
                time.sleep(_LAG_S)
            sys.exit(1)
        leave_group()

    return record(wrapper) if 'TORCHELASTIC_ERROR_FILE' in os.environ else wrapper

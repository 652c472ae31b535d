"""Keeps a second training out of a work directory in which one runs."""

import os
import socket
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, Union

from ..claim import claim
from .errors import CommandError

LOCK = '.lock'


@contextmanager
def locked(work_dir: Union[str, Path]) -> Iterator[None]:
    """Holds a work directory; it is made where it does not exist.

    Two trainings in one would write over each other's checkpoints and tell nothing. A file
    system that has no locks is not guarded.

    Args:
        work_dir (str or Path): Where the training writes.

    Raises:
        CommandError: The training of another process holds it, or its lock cannot be written.
    """
    path = Path(work_dir) / LOCK
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = path.open('a+')
    except OSError as error:  # such as the lock of another user
        raise CommandError(f'work_dir: cannot write to {path} ({error.strerror})') from error
    with opened as file:
        if not claim(file):
            file.seek(0)
            raise CommandError(
                f'work_dir: {file.read() or "another training"} writes to {work_dir}; wait for it, '
                'end it, or give another folder by --work-dir'
            )
        file.truncate(0)
        file.write(f'process {os.getpid()} on {socket.gethostname()}')
        file.flush()
        yield

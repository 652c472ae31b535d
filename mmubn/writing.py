"""Checks before the work starts that results can be written, and writes tables and whole files."""

import csv
import errno
import os
import tempfile
from pathlib import Path
from typing import Any, Iterable, Union

from .cli.errors import CommandError

Place = Union[str, Path]
OTHER_PLACE = 'name another place'


def check_folder(key: str, folder: Place, size: int = 1, remedy: str = OTHER_PLACE) -> None:
    """Writes a file of a size into a folder, and takes it away at once.

    A folder that does not exist yet is judged by the nearest one above it.

    Args:
        key (str): What the user named the folder by.
        folder (str or Path): Its path.
        size (int): Of the file, in bytes.
        remedy (str): What to do where it fails.

    Raises:
        CommandError: Nothing can be written there, or no file of this size.
    """
    path = Path(folder).absolute()
    existing = next(place for place in (path, *path.parents) if os.path.lexists(place))
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b' ')
            if hasattr(os, 'posix_fallocate'):  # macOS has none
                os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            needed = f' for a checkpoint of {size / 1e6:.1f} MB' if size > 1 else ''
            raise CommandError(
                f'{key}: no room in {existing}{needed} ({error.strerror}); {remedy}'
            ) from error
        raise CommandError(
            f'{key}: cannot write to {existing} ({error.strerror}); {remedy}'
        ) from error


def check_file(key: str, file: Place) -> None:
    """The same for a file; its folder may be missing.

    Args:
        key (str): What the user named the file by.
        file (str or Path): Its path.

    Raises:
        CommandError: It is a folder, may not be changed, or nothing can be written beside it.
    """
    if os.path.isdir(file):
        raise CommandError(f'{key}: {file} is a folder; name a file')
    if os.path.exists(file) and not os.access(file, os.W_OK):
        raise CommandError(f'{key}: {file} may not be changed; name another file')
    check_folder(key, Path(file).parent)


def replace_text(path: Place, text: str) -> None:
    """Writes a file so that a kill at any byte leaves the old content or the new one."""
    partial = Path(f'{path}.partial')
    partial.write_text(text)
    os.replace(partial, path)


def write_csv(path: Place, header: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Writes a table; its folder is made where it is missing."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'w', newline='', encoding='utf-8') as file:
        csv.writer(file, lineterminator='\n').writerows([header, *rows])

"""Whether something can be written, found out before the work that it is the result of."""

import os
import tempfile
from pathlib import Path
from typing import Union

Place = Union[str, Path]


def nearest_existing(path: Place) -> Path:
    """The path itself, or the nearest above it that exists."""
    path = Path(path).absolute()
    return next(place for place in (path, *path.parents) if os.path.lexists(place))


def check_folder(option: str, folder: Place) -> None:
    """Writes a file into the folder, which may be missing, and takes it away.

    For the tools that need no OpenMMLab; the others have
    :func:`~mmubn.cli.work_dir_check.check_writable`.

    Args:
        option (str): What the user named it by.
        folder (str or Path): Its path.

    Raises:
        SystemExit: Nothing can be written there.
    """
    existing = nearest_existing(folder)
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        reason = f'cannot write to {existing} ({error.strerror})'
        raise SystemExit(f'error: {option}: {reason}; name another place') from error


def check_file(option: str, file: Place) -> None:
    """Whether a file can be written; its folder may be missing.

    Args:
        option (str): What the user named it by.
        file (str or Path): Its path.

    Raises:
        SystemExit: It is a folder, may not be changed, or nothing can be written beside it.
    """
    file = Path(file)
    if file.is_dir():
        raise SystemExit(f'error: {option}: {file} is a folder; name a file')
    if file.exists() and not os.access(file, os.W_OK):
        raise SystemExit(f'error: {option}: {file} may not be changed; name another file')
    check_folder(option, file.parent)

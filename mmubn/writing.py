"""Whether something can be written, found out before the work that it is the result of."""

import errno
import os
import tempfile
from pathlib import Path
from typing import Union

Place = Union[str, Path]
OTHER_PLACE = 'name another place'


def folder_fault(folder: Place, size: int = 1, remedy: str = OTHER_PLACE) -> str:
    """Why no file of a size can be written into a folder; empty where it can.

    What is written goes away at once. A folder that does not exist yet is judged by the
    nearest one above it.

    Args:
        folder (str or Path): Its path.
        size (int): Of the file, in bytes.
        remedy (str): What to do where it fails.
    """
    path = Path(folder).absolute()
    existing = next(place for place in (path, *path.parents) if os.path.lexists(place))
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return (
                f'no room in {existing} for a checkpoint of {size / 1e6:.1f} MB '
                f'({error.strerror}); {remedy}'
            )
        return f'cannot write to {existing} ({error.strerror}); {remedy}'
    return ''


def file_fault(file: Place) -> str:
    """Why a file cannot be written, as :func:`folder_fault`; its folder may be missing."""
    if os.path.isdir(file):
        return f'{file} is a folder; name a file'
    if os.path.exists(file) and not os.access(file, os.W_OK):
        return f'{file} may not be changed; name another file'
    return folder_fault(Path(file).parent)


def check_folder(option: str, folder: Place) -> None:
    """For the tools that need no OpenMMLab; the others have :mod:`mmubn.cli.work_dir_check`.

    Args:
        option (str): What the user named the folder by.
        folder (str or Path): Its path.

    Raises:
        SystemExit: Nothing can be written there.
    """
    _exit(option, folder_fault(folder))


def check_file(option: str, file: Place) -> None:
    """The same of a file; its folder may be missing.

    Args:
        option (str): What the user named the file by.
        file (str or Path): Its path.

    Raises:
        SystemExit: It is a folder, may not be changed, or nothing can be written beside it.
    """
    _exit(option, file_fault(file))


def _exit(option: str, fault: str) -> None:
    if fault:
        raise SystemExit(f'error: {option}: {fault}')

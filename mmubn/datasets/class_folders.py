"""Folders of images, one for each class, and the folders beside them that are none."""

import os
from typing import List

# What macOS, Windows, Synology, Jupyter and Python leave between the classes.
_PREFIXES = ('.', '__', '@', '$')
_NAMES = ('lost+found', 'System Volume Information')


def is_foreign(name: str) -> bool:
    """Whether a folder or file of this name was made by a program, not for the data."""
    return name.startswith(_PREFIXES) or name in _NAMES


def class_folders(root: str) -> List[str]:
    """The names of the class folders in ``root``, in the order in which they are numbered."""
    with os.scandir(root) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not is_foreign(e.name))


def foreign_folders(root: str) -> List[str]:
    """The names of the folders in ``root`` that are no classes, in order."""
    with os.scandir(root) as entries:
        return sorted(e.name for e in entries if e.is_dir() and is_foreign(e.name))

"""Data that the package makes or reads itself. Nothing here is imported by ``import mmubn``."""

from typing import Any

__all__ = ['CLASSES', 'make_scenes']


def __getattr__(name: str) -> Any:
    # Class folders are read without what drawing scenes needs.
    if name not in __all__:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from . import scenes

    return getattr(scenes, name)

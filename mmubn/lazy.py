"""Packages that import a class when it is asked for, and know the names of all before."""

from importlib import import_module
from typing import Any, Callable, Dict


def getter(package: str, modules: Dict[str, str]) -> Callable[[str], Any]:
    """A package's ``__getattr__``.

    Args:
        package (str): Its ``__name__``.
        modules (dict): Public name -> the module of the package that defines it.
    """

    def __getattr__(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f'module {package!r} has no attribute {name!r}')
        return getattr(import_module(f'{package}.{modules[name]}'), name)

    return __getattr__

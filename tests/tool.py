"""Runs the commands in tools/ as the interpreter does, in the process of the test."""

import runpy
import sys
from pathlib import Path
from typing import Any, Dict

import pytest

ROOT = Path(__file__).parents[1]


def run_tool(name: str, *argv: object) -> None:
    """Runs tools/``name``.py with these arguments."""
    path = str(ROOT / 'tools' / f'{name}.py')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', [path, *map(str, argv)])
        runpy.run_path(path, run_name='__main__')


def names_of(name: str) -> Dict[str, Any]:
    """What tools/``name``.py defines; it is not run."""
    return runpy.run_path(str(ROOT / 'tools' / f'{name}.py'))

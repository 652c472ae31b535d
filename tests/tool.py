"""Runs the commands in tools/ as the interpreter does, in the process of the test."""

import csv
import runpy
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import pytest

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / 'configs'


def version(text: str) -> Tuple[int, ...]:
    """Major and minor, to compare."""
    return tuple(int(part) for part in text.split('.')[:2])


def run_tool(name: str, *argv: object) -> None:
    """Runs tools/``name``.py with these arguments."""
    path = str(ROOT / 'tools' / f'{name}.py')
    if 'mmengine.visualization' in sys.modules:  # mmdet's would write where the first of them did
        base = sys.modules['mmengine.visualization'].Visualizer
        for visualizer in (base, *base.__subclasses__()):
            visualizer._instance_dict.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', [path, *map(str, argv)])
        runpy.run_path(path, run_name='__main__')


@contextmanager
def saved_figures() -> Iterator[Dict[str, Any]]:
    """The figures that are saved meanwhile, by the names of their files."""
    figure = pytest.importorskip('matplotlib.figure').Figure
    saved, save = {}, figure.savefig

    def savefig(self, path, *arguments, **settings):
        save(self, path, *arguments, **settings)
        saved[Path(path).name] = self

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figure, 'savefig', savefig)
        yield saved


def read_csv(path: Path) -> List[Dict[str, str]]:
    """The rows of a table, by the names of its columns."""
    with path.open(newline='') as file:
        return list(csv.DictReader(file))


def names_of(name: str) -> Dict[str, Any]:
    """What tools/``name``.py defines; it is not run."""
    return runpy.run_path(str(ROOT / 'tools' / f'{name}.py'))

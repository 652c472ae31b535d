"""Fixtures of the tools' tests."""

from pathlib import Path

import pytest
from tool import run_tool

pytest.importorskip('mmpretrain')


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A folder with ``tiny.py`` and ``images/``, which is the working directory."""
    from tiny_project import make_project

    make_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def fails(capsys, tmp_path, monkeypatch):
    """Runs a tool that must fail, in an empty folder; returns its last line on stderr."""
    monkeypatch.chdir(tmp_path)

    def run(tool: str, *argv: str) -> str:
        with pytest.raises(SystemExit) as caught:
            run_tool(tool, *argv)
        assert caught.value.code == 1
        assert not Path('work_dirs').exists()
        return capsys.readouterr().err.splitlines()[-1]

    return run

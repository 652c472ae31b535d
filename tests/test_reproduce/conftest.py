"""Fixtures of the tests of the reproduction."""

import pytest

pytest.importorskip('mmpretrain')

from hand_made import write_logs


@pytest.fixture(scope='session', autouse=True)
def _metafiles_read_once(metafiles_read_once):
    pass


@pytest.fixture
def logs(tmp_path, monkeypatch):
    """A working directory with logs."""
    monkeypatch.chdir(tmp_path)
    write_logs()
    return tmp_path

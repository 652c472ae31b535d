"""Fixtures of the command line's tests."""

import pytest

pytest.importorskip('mmengine')

from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope


@pytest.fixture(autouse=True)
def _scope(request, tmp_path, monkeypatch):
    """An empty working directory, and the default scope that the module's ``SCOPE`` names."""
    monkeypatch.chdir(tmp_path)
    MMLogger._instance_dict.clear()  # those of earlier tests write to streams that are closed
    with DefaultScope.overwrite_default_scope(getattr(request.module, 'SCOPE', None)):
        yield

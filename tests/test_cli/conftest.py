"""Fixtures of the command line's tests."""

import pytest

pytest.importorskip('mmengine')

from mmengine.registry import DefaultScope


@pytest.fixture(autouse=True)
def _scope(request, tmp_path, monkeypatch):
    """An empty working directory, and the default scope that the module's ``SCOPE`` names."""
    monkeypatch.chdir(tmp_path)
    with DefaultScope.overwrite_default_scope(getattr(request.module, 'SCOPE', None)):
        yield

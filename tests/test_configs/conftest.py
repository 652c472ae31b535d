"""Fixtures of the configs' tests."""

import pytest

pytest.importorskip('mmpretrain')


@pytest.fixture(scope='session', autouse=True)
def _metafiles_read_once(metafiles_read_once):
    pass

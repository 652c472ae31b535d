"""Fixtures of the tests of the reproduction."""

from pathlib import Path

import pytest

pytest.importorskip('mmpretrain')

from hand_made import small, write_run


@pytest.fixture(scope='session', autouse=True)
def _metafiles_read_once(metafiles_read_once):
    pass


@pytest.fixture
def logs(tmp_path, monkeypatch):
    """BN and UBN, three seeds each; the values are all there is to the report."""
    monkeypatch.chdir(tmp_path)
    Path('net.py').write_text('train_cfg = dict(max_epochs=3)\nmodel = dict(backbone=dict())\n')
    bn = [(30.0, 41.0, 40.0), (30.0, 41.0, 42.0), (30.0, 43.0, 44.0)]
    ubn = [(40.0, 39.0, 41.0), (20.0, 42.0, 45.0), (43.0, 44.0, 48.0)]
    for seed in range(3):
        for norm, curves, seconds in (('BN', bn, 0.1), ('UBN', ubn, 0.2)):
            part = [(e + 1, seconds, v) for e, v in enumerate(curves[seed])]
            write_run(small(norm, seed), 3, [part], seed)
    return tmp_path

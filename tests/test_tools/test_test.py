"""The options of tools/test.py."""

import os
from argparse import Namespace

import pytest
from mmengine.config import Config
from tool import names_of


@pytest.mark.parametrize(
    ('kind', 'key'),
    [
        ('mmdet.DetVisualizationHook', 'test_out_dir'),
        ('mmpretrain.VisualizationHook', 'out_dir'),
    ],
)
@pytest.mark.parametrize(
    ('folder', 'want'), [('drawn', 'CWD/drawn'), ('/any/drawn', '/any/drawn'), (None, None)]
)
def test_show_dir_is_absolute(tmp_path, monkeypatch, kind, key, folder, want):
    """By the hook, as a config of pure Python has no default scope."""
    pytest.importorskip(kind.split('.')[0])
    monkeypatch.chdir(tmp_path)
    cfg = Config(dict(default_scope=None, default_hooks=dict(visualization=dict(type=kind))))
    args = Namespace(checkpoint='x.pth', out=None, show=True, show_dir=folder, wait_time=0)
    names_of('test')['merge_args'](cfg, args)
    want = want and want.replace('CWD', os.getcwd())
    assert cfg.default_hooks.visualization[key] == want

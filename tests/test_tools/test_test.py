"""The options of tools/test.py."""

import os
from argparse import Namespace

import pytest
from mmengine.config import Config
from tool import names_of


@pytest.mark.parametrize(('scope', 'key'), [('mmdet', 'test_out_dir'), ('mmpretrain', 'out_dir')])
@pytest.mark.parametrize(
    ('folder', 'want'), [('drawn', 'CWD/drawn'), ('/any/drawn', '/any/drawn'), (None, None)]
)
def test_show_dir_is_absolute(tmp_path, monkeypatch, scope, key, folder, want):
    monkeypatch.chdir(tmp_path)
    cfg = Config(dict(default_scope=scope, default_hooks=dict(visualization=dict(type='Any'))))
    args = Namespace(checkpoint='x.pth', out=None, show=True, show_dir=folder, wait_time=0)
    names_of('test')['merge_args'](cfg, args)
    want = want and want.replace('CWD', os.getcwd())
    assert cfg.default_hooks.visualization[key] == want

"""docs/classification.md: its commands name configs that exist and options that they have.

docs/own_data.md: its configs build a model that has UBN, and read the folders that the page names.
"""

import re

import pytest
from mmengine.config import Config
from mmengine.registry import DefaultScope
from resolved import resolved
from tool import ROOT

from mmubn.cli.model import build_model
from mmubn.cli.norm_check import check_norms
from mmubn.cli.options import make_parser
from mmubn.layers import UBN

COMMANDS = re.findall(r'`P (configs/.+?)`', (ROOT / 'docs' / 'classification.md').read_text())
OWN_DATA = re.findall(r'```python\n(.+?)```', (ROOT / 'docs' / 'own_data.md').read_text(), re.S)


def test_every_config_of_the_paper_has_a_command():
    named = {command.split()[0] for command in COMMANDS}
    folders = [ROOT / 'configs' / name for name in ('imagenet', 'cifar100', 'cifar10')]
    found = {file.relative_to(ROOT).as_posix() for d in folders for file in d.glob('*.py')}
    small = {f'configs/{data}/resnet18_small_{data}.py' for data in ('cifar10', 'cifar100')}
    assert found - named == small
    assert len(COMMANDS) == len(set(COMMANDS)) + 2  # BN and UBN of Figure 5 are of Table 4 too


@pytest.mark.parametrize('command', sorted(c for c in set(COMMANDS) if '--cfg-options' in c))
def test_options_are_settings_of_the_config(command):
    args = make_parser('').parse_args(command.split())
    cfg = resolved(args.config.partition('/')[2])
    for key in args.cfg_options:
        node = cfg
        *parents, last = key.split('.')
        for parent in parents:
            node = node[parent]
        if 'norm_cfg' not in parents:
            assert last in node
    cfg.merge_from_dict(args.cfg_options)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        check_norms(cfg)


@pytest.mark.parametrize(('place', 'scope'), enumerate(['mmdet', 'mmpretrain']))
def test_configs_for_own_data(place, scope):
    pytest.importorskip(scope)
    cfg = Config.fromstring(OWN_DATA[place], '.py')
    with DefaultScope.overwrite_default_scope(scope):
        model = build_model(cfg)
    norms = [m for m in model.backbone.modules() if isinstance(m, UBN)]
    assert {norm.fct for norm in norms} == {None}
    assert len(OWN_DATA) == 2
    for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        assert cfg[loader].dataset.data_root == 'data/pets/'

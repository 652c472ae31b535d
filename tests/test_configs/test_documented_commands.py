"""docs/classification.md: its commands name configs that exist and options that they have."""

import re
from functools import cache

import pytest
from mmengine.config import Config
from mmengine.registry import DefaultScope
from tool import ROOT

from mmubn.cli.norm_check import check_norms
from mmubn.cli.options import make_parser

pytest.importorskip('mmpretrain')
COMMANDS = re.findall(r'`P (configs/.+?)`', (ROOT / 'docs' / 'classification.md').read_text())


@cache
def load(name: str) -> dict:
    return Config.fromfile(ROOT / name).to_dict()


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
    cfg = Config(load(args.config))
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

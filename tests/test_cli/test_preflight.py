"""All checks together."""

import pytest
from mmengine.config import Config
from torch import nn

from mmubn.cli import preflight
from mmubn.cli.errors import CommandError


@pytest.fixture
def cfg(monkeypatch) -> Config:
    monkeypatch.setattr(preflight, 'check_norms', lambda cfg: None)
    monkeypatch.setattr(preflight, 'build_model', lambda cfg: nn.Module())
    return Config(dict(work_dir='x'))


def test_a_check_that_fails_itself_stops_no_training(cfg, monkeypatch, capsys):
    made = []

    def check_broken(cfg, model):
        raise AttributeError('no such\nthing')

    monkeypatch.setitem(
        preflight.CHECKS, 'train', (check_broken, lambda cfg, model: made.append(cfg))
    )
    preflight.preflight(cfg, 'train')
    assert made == [cfg]
    assert capsys.readouterr().err == (
        'warning: the check check_broken cannot judge this config, and is left out '
        '(AttributeError: no such thing)\n'
    )


def test_what_a_check_finds_stops_it(cfg, monkeypatch):
    def check_sound(cfg, model):
        raise CommandError('work_dir: no')

    monkeypatch.setitem(preflight.CHECKS, 'train', (check_sound,))
    with pytest.raises(CommandError, match='work_dir: no'):
        preflight.preflight(cfg, 'train')

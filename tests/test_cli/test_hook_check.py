"""Arguments of hooks, before the work directory is made."""

import pytest
from mmengine.config import Config
from torch import nn

from mmubn.cli.errors import CommandError
from mmubn.cli.hook_check import check_hooks

SCOPE = 'mmengine'


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))


def test_sound_hooks():
    hooks = [dict(type='CondensationHook', layers='1', priority='LOW'), dict(type='UBNCheckHook')]
    hooks.append(dict(type='EMAHook', begin_epoch=-5))  # mmengine's own
    saving = dict(type='CheckpointHook', interval=-1, save_best=['a', 'b'], rule='greater')
    default = dict(timer=None, logger=dict(type='LoggerHook', interval=1), checkpoint=saving)
    check_hooks(Config(dict(custom_hooks=hooks, default_hooks=default)), model())


@pytest.mark.parametrize(
    ('hook', 'reason'),
    [
        (
            dict(type='CondensationHook', layers='zzz'),
            "layers='zzz' matches none of the 1 batch no",
        ),
        (
            dict(type='CondensationHook', layers='('),
            r"layers='\(' is no regular expression: missing",
        ),
        (dict(type='CondensationHook', interval=0), 'interval counts iterations and must be posi'),
        (dict(type='CondensationHook', interval='x'), "'<' not supported"),
        (dict(type='LoggerHook', interval=0), 'interval must be greater than 0'),
        (dict(type='LoggerHook', interval=0.5), 'interval must be an integer'),
        (dict(type='CheckpointHook', save_best='a', rule='more'), 'rule must be greater, less or'),
        (dict(type='CheckpointHook', save_best=3), '"save_best" should be a str or list of str'),
        (dict(type='NonFiniteHook', action='skpi'), "action must be 'stop' or 'skip', got 'skpi'"),
    ],
)
def test_error_names_the_hook(hook, reason):
    cfg = Config(dict(custom_hooks=[dict(type='UBNCheckHook'), hook]))
    with pytest.raises(CommandError, match=f'^custom_hooks.1: .*{reason}'):
        check_hooks(cfg, model())
    cfg = Config(dict(default_hooks=dict(ours=hook)))
    with pytest.raises(CommandError, match=f'^default_hooks.ours: .*{reason}'):
        check_hooks(cfg, model())


def test_a_hook_that_is_there_twice():
    base = [dict(type='UBNCheckHook'), dict(type='NonFiniteHook')]
    hooks = [dict(type='NonFiniteHook', action='skip'), *base]  # the other would stop
    line = r'^custom_hooks\.2: a second NonFiniteHook beside custom_hooks\.0, and both would act'
    with pytest.raises(CommandError, match=line):
        check_hooks(Config(dict(custom_hooks=hooks)), model())
    check_hooks(Config(dict(custom_hooks=[dict(type='EMAHook'), dict(type='EMAHook')])), model())

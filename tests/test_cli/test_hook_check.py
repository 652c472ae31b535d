"""Arguments of the project's hooks, before the work directory is made."""

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
    check_hooks(Config(dict(custom_hooks=hooks, default_hooks=dict(timer=None))), model())


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

"""What trains is what the config says: the hooks of every config, by itself and as a base."""

import logging

import pytest
from mmengine.config import Config
from mmengine.registry import HOOKS, DefaultScope
from resolved import resolved
from tool import CONFIGS

from mmubn import registry
from mmubn.cli.lookup import find_class
from mmubn.hooks import __all__ as OURS

pytest.importorskip('mmdet')
NAMES = sorted(
    str(f.relative_to(CONFIGS)) for f in CONFIGS.rglob('*.py') if '_base_' not in f.parts
)
SHARED = [hook.type for hook in resolved('_base_/hooks.py').custom_hooks]

SCOPED = [('HOOKS', 'UBNCheckHook'), ('PARAM_SCHEDULERS', 'LinearLR')]


@pytest.mark.parametrize('name', NAMES)
def test_every_config_names_its_hooks(name):
    cfg = resolved(name)
    assert 'mmubn' in cfg.custom_imports.imports
    kinds = [hook.type for hook in cfg.custom_hooks]
    assert kinds in (SHARED, ['CondensationHook', *SHARED])
    assert set(kinds) <= set(OURS)


def test_a_config_elsewhere_gets_them_from_the_base():
    text = """
_base_ = ['mmdet::_base_/default_runtime.py', 'mmubn::_base_/hooks.py']
custom_hooks = [dict(type='CondensationHook'), *_base_.custom_hooks]
"""
    cfg = Config.fromstring(text, '.py')
    with DefaultScope.overwrite_default_scope('mmdet'):
        built = [find_class(hook, HOOKS) for hook in cfg.custom_hooks]
    assert [hook.__name__ for hook in built] == ['CondensationHook', *SHARED]


@pytest.mark.parametrize(('name', 'kind'), SCOPED)
def test_the_scope_of_the_base_warns_of_nothing(name, kind, monkeypatch):
    """It said, once a process: mmubn is not installed, please `pip install mmubn`."""
    logged = []
    monkeypatch.setattr('mmengine.logging.print_log', lambda *args, **kwargs: logged.append(kwargs))
    scope = getattr(registry, name)
    monkeypatch.setattr(scope, '_imported', False)
    assert scope.get(kind) is not None
    assert logged
    assert all(entry['level'] == logging.DEBUG for entry in logged)

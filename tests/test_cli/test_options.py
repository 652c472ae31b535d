"""The options that the tools share."""

from pathlib import Path

import pytest
from mmengine.registry import DefaultScope

from mmubn.cli.errors import CommandError
from mmubn.cli.options import load_config, make_parser


def load(text: str, *options: str):
    Path('config.py').write_text(text)
    return load_config(make_parser('').parse_args(['config.py', *options]))


@pytest.mark.parametrize(
    ('text', 'scope'),
    [('', 'mmengine'), ('default_scope = None', None), ("default_scope = 'x'", 'x')],
)
def test_the_scope_is_that_of_the_config(text, scope):
    """Pure Python configs of mmdet have None: their heads then build what mmdet registers."""
    with DefaultScope.overwrite_default_scope('before'):
        load(f'model = dict()\n{text}')
        assert DefaultScope.get_current_instance().scope_name == (scope or 'before')


def test_checks_can_be_skipped():
    text = "model = dict(type='X')\nenv_cfg = dict(resource_limits=1)"
    with pytest.raises(CommandError, match="takes no 'resource_limits', did you mean"):
        load(text)
    assert load(text, '--skip-checks').env_cfg.resource_limits == 1

"""The registries of the scope ``mmubn``.

mmengine gives what a config has by ``_base_ = 'mmubn::...'`` this scope and looks for it
here. The types are those of the root, where :mod:`mmubn.registration` puts ours. It is named
as the location, or mmengine looks for ``mmubn.utils`` and warns that mmubn is not installed.
"""

from mmengine.registry import HOOKS as ROOT_HOOKS
from mmengine.registry import PARAM_SCHEDULERS as ROOT_PARAM_SCHEDULERS
from mmengine.registry import Registry

_OURS = dict(scope='mmubn', locations=['mmubn.registration'])
HOOKS = Registry('hook', parent=ROOT_HOOKS, **_OURS)
PARAM_SCHEDULERS = Registry('parameter scheduler', parent=ROOT_PARAM_SCHEDULERS, **_OURS)

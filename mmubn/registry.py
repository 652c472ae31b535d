"""The registries of the scope ``mmubn``.

mmengine gives what a config has by ``_base_ = 'mmubn::...'`` this scope and looks for it
here. The types are those of the root, where :mod:`mmubn.registration` puts ours.
"""

from mmengine.registry import HOOKS as ROOT_HOOKS
from mmengine.registry import PARAM_SCHEDULERS as ROOT_PARAM_SCHEDULERS
from mmengine.registry import Registry

HOOKS = Registry('hook', scope='mmubn', parent=ROOT_HOOKS)
PARAM_SCHEDULERS = Registry('parameter scheduler', scope='mmubn', parent=ROOT_PARAM_SCHEDULERS)

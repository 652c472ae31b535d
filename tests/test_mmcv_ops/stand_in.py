"""The stand-in of this checkout, loaded from its file."""

import importlib.util
import sys
from types import ModuleType
from typing import List

from tool import ROOT

PART = ROOT / 'tools' / 'mmcv_ops'


def load_stand_in() -> ModuleType:
    """The module tools/mmcv_ops/mmcv/_ext.py, whatever ``mmcv._ext`` is here."""
    spec = importlib.util.spec_from_file_location('mmcv_stand_in', PART / 'mmcv' / '_ext.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def users() -> List[ModuleType]:
    """The modules of ``mmcv.ops`` that call an operator."""
    modules = [m for name, m in sys.modules.items() if name.startswith('mmcv.ops.')]
    return [m for m in modules if hasattr(m, 'ext_module')]

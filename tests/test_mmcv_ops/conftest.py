"""mmcv's operators with the stand-in of this checkout beneath, wherever the tests run."""

import importlib
import importlib.machinery
import warnings
from types import ModuleType

import pytest

pytest.importorskip('mmcv')
pytest.importorskip('mmcv.ops', reason='mmcv has no operators at all', exc_type=ImportError)

from stand_in import load_stand_in, users


@pytest.fixture(scope='session')
def ext() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # it knows this mmcv
        return load_stand_in()


@pytest.fixture(autouse=True)
def stand_in(ext, monkeypatch):
    """Every operator of ``mmcv.ops`` goes to the stand-in."""
    for module in users():
        monkeypatch.setattr(module, 'ext_module', ext)


@pytest.fixture(scope='session')
def compiled() -> ModuleType:
    """The operators of mmcv itself; the test is skipped where they are not compiled."""
    module = importlib.import_module('mmcv._ext')
    if not isinstance(module.__spec__.loader, importlib.machinery.ExtensionFileLoader):
        pytest.skip("mmcv's own operators are not compiled here: `make env OPS=1`")
    return module

"""What `import mmubn` brings along."""

import subprocess
import sys

import pytest

SCRIPT = """
import importlib.util, sys, torch
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == 'mmengine' else find(name, *a)
before = {*sys.modules}
import mmubn
new = sys.modules.keys() - before
print(*(name for name in new if name.split('.')[0] not in sys.stdlib_module_names))
"""


@pytest.mark.skipif(sys.version_info < (3, 10), reason='Python 3.9 does not list its own modules')
@pytest.mark.newer_torch('its is_compiling is in the compiler', than='2.2')
def test_torch_alone_and_no_compiler():
    run = subprocess.run([sys.executable, '-c', SCRIPT], capture_output=True, text=True, check=True)
    found = run.stdout.split()
    assert {name.split('.')[0] for name in found} <= {'mmubn', 'torch'}
    assert not any(name.startswith('torch._dynamo') for name in found)

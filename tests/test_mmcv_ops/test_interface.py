"""What the stand-in refuses, which mmcv it knows, and who wins beside a compiled one."""

import ast
import importlib.machinery
import re
import subprocess
import sys
import types

import mmcv
import pytest
import torch
from mmcv.ops import (
    CARAFE,
    RoIAlign,
    RoIPool,
    get_compiler_version,
    modulated_deform_conv2d,
    nms_match,
    softmax_focal_loss,
)
from stand_in import PART, load_stand_in

REFUSED = {
    'roi_pool_forward': lambda x, rois: RoIPool((2, 2), 1.0)(x, rois),
    "RoIAlign with pool_mode='max'": lambda x, rois: RoIAlign((2, 2), 1.0, pool_mode='max')(
        x, rois
    ),
    'modulated_deform_conv_forward with offsets of another size than the output': (
        lambda x, rois: modulated_deform_conv2d(
            x, x.new_zeros(1, 18, 9, 9), x.new_ones(1, 9, 9, 9), torch.rand(2, 4, 3, 3), None, 1, 1
        )
    ),
    'carafe_forward': lambda x, rois: CARAFE(3, 1, 2)(x, torch.rand(1, 9, 16, 16)),
    'softmax_focal_loss_forward': lambda x, rois: softmax_focal_loss(x[0, 0], torch.arange(8)),
    'nms_match': lambda x, rois: nms_match(rois, 0.5),
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_torchvision_has_not_is_refused_in_one_line(name):
    with pytest.raises(NotImplementedError) as caught:
        REFUSED[name](torch.rand(1, 4, 8, 8), torch.tensor([[0, 1.0, 1, 6, 6]]))
    message = str(caught.value)
    assert message.startswith(f'{name}: ')
    assert '\n' not in message
    assert 'make env OPS=1' in message
    assert 'pip install --no-cache-dir --no-build-isolation --no-deps --force-reinstall' in message
    assert re.search(rf'(onedl-)?mmcv=={mmcv.__version__}`', message)


def test_every_operator_that_mmcv_loads_is_there(ext):
    for name in ('ms_deform_attn_forward', 'nms_rotated', *ext.SERVED):
        assert callable(getattr(ext, name))
    assert not hasattr(ext, '__path__')
    assert get_compiler_version() == 'none, torchvision stands in'


def test_the_readme_lists_what_is_served(ext):
    rows = re.findall(r'^\| `(.+?)` \| (.+?) \|', (PART / 'README.md').read_text(), re.MULTILINE)
    listed = {name: by.strip('`') for names, by in rows for name in names.split('`, `')}
    assert listed == ext.SERVED


@pytest.mark.parametrize('version', ['2.1.1', None])
def test_an_unknown_mmcv_is_told(monkeypatch, version):
    other = types.ModuleType('mmcv')
    if version:
        other.__version__ = version
    monkeypatch.setitem(sys.modules, 'mmcv', other)
    with pytest.warns(UserWarning, match=f'the mmcv here is {version or "missing"}: install one'):
        load_stand_in()


@pytest.mark.parametrize('suffix', importlib.machinery.EXTENSION_SUFFIXES)
def test_a_compiled_module_wins(tmp_path, suffix):
    """Python's own order of suffixes, which a wrong packaging would not get round."""
    (tmp_path / '_ext.py').write_bytes((PART / 'mmcv' / '_ext.py').read_bytes())
    found = importlib.machinery.PathFinder.find_spec('_ext', [str(tmp_path)])
    assert found.origin == str(tmp_path / '_ext.py')
    (tmp_path / f'_ext{suffix}').touch()
    importlib.invalidate_caches()
    found = importlib.machinery.PathFinder.find_spec('_ext', [str(tmp_path)])
    assert found.origin == str(tmp_path / f'_ext{suffix}')


def test_the_wheel_holds_one_module_beside_mmcv(tmp_path):
    """Built as pip builds it for others; it names what it needs, and no mmcv."""
    import shutil
    import zipfile

    source = tmp_path / 'source'
    shutil.copytree(PART, source, ignore=shutil.ignore_patterns('build', '*.egg-info'))
    pip = [sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '--no-build-isolation']
    subprocess.run([*pip, '--wheel-dir', tmp_path, source], check=True)
    (wheel,) = tmp_path.glob('*.whl')
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if '.dist-info/' not in name]
        assert names == ['mmcv/_ext.py']
        metadata = archive.read(f'{wheel.name.split("-py3")[0]}.dist-info/METADATA').decode()
    needs = re.findall(r'^Requires-Dist: (\w+)', metadata, re.MULTILINE)
    assert sorted(needs) == ['numpy', 'torch', 'torchvision']


def test_it_needs_nothing_else():
    tree = ast.parse((PART / 'mmcv' / '_ext.py').read_text())
    imports = {
        (node.module if isinstance(node, ast.ImportFrom) else alias.name).split('.')[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    assert imports - set(sys.stdlib_module_names) == {'mmcv', 'numpy', 'torch', 'torchvision'}

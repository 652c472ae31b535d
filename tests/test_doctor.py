"""The doctor: what it prints here, without anything, and where something does not fit."""

import importlib.util
import re
import subprocess
import sys
import types
from importlib import metadata
from pathlib import Path

import pytest
import torch
from tool import ROOT

from mmubn import doctor


def lines(check):
    return {line.name: line for line in check()}


def run(*command):
    return subprocess.run([sys.executable, *command], capture_output=True, text=True)


def test_this_environment_fits():
    """Versions as installed; exit code 0, which the environment of the tests must earn."""
    done = run('-m', 'mmubn.doctor')
    assert (done.returncode, done.stderr) == (0, '')
    assert done.stdout.endswith('Everything fits.\n')
    installed = {d.metadata['Name'].lower(): d.version for d in metadata.distributions()}
    for name, distributions in doctor.PACKAGES.items():
        versions = [installed[d] for d in distributions if d in installed]
        version = re.escape((versions or ['not installed'])[0])
        assert re.search(rf'^  {name} .*{version}$', done.stdout, re.M)
    assert re.search('^  backend [a-z]+ +yes: .', done.stdout, re.M)


def test_runs_where_nothing_is_installed():
    # As `make doctor` does; beside an installed file the packages would be found.
    done = run('-S', '-E', str(ROOT / 'mmubn' / 'doctor.py'))
    assert done.returncode == 1
    assert not done.stderr
    assert re.search('^! torch +not installed$', done.stdout, re.M)
    assert re.search('^  mmdet +not installed$', done.stdout, re.M)
    assert '- torch: `pip install torch`' in done.stdout


@pytest.mark.parametrize(
    ('error', 'remedy'),
    [
        ("No module named 'mmcv._ext'", 'tools/mmcv_ops'),
        ('libGL.so.1: cannot open shared object file', 'opencv-python-headless'),
        ('operator torchvision::nms does not exist', 'torch and torchvision of one release'),
        ('numpy.core.multiarray failed to import', 'numpy<2'),
        ('MMCV==2.2.0 is used but incompatible. Please install', 'install the mmcv that'),
        ("No module named 'terminaltables'", 'pip install terminaltables'),
        ("No module named 'cv2'", 'pip install opencv-python-headless'),
        ("No module named 'yaml'", 'pip install PyYAML'),
        ("No module named 'PIL.Image'", 'pip install Pillow'),
        ('something else', 'pip install --force-reinstall'),
    ],
)
def test_a_failed_import_has_its_remedy(error, remedy, monkeypatch):
    def fail(name):
        raise ImportError(f'{error}\nand more')

    monkeypatch.setattr(doctor.importlib, 'import_module', fail)
    torch = lines(doctor.packages)['torch']
    assert f'cannot be imported: ImportError: {error} and more' in torch.value
    assert remedy in torch.remedy


def test_two_distributions_of_one_package(monkeypatch):
    versions = {'onedl-mmcv': '2.3.6', 'mmcv': '2.1.0'}
    monkeypatch.setattr(doctor, '_version', lambda name: versions.get(name, ''))
    mmcv = lines(doctor.packages)['mmcv']
    assert 'onedl-mmcv 2.3.6' in mmcv.value
    assert '2.1.0' in mmcv.value
    assert mmcv.remedy.startswith('keep one: `pip uninstall onedl-mmcv mmcv`')


@pytest.fixture
def mmcv_ext(monkeypatch):
    """Sets what ``mmcv._ext`` is and what happens when it is imported."""
    monkeypatch.setattr(doctor, '_version', lambda name: '2.1.0' if name == 'mmcv' else '')

    def place(origin, load=lambda: None):
        spec = origin and types.SimpleNamespace(origin=origin)
        monkeypatch.setattr(importlib.util, 'find_spec', lambda name: spec)
        monkeypatch.setattr(doctor.importlib, 'import_module', lambda name: load())
        return lines(doctor.operators)['operators']

    return place


def test_no_operators(mmcv_ext):
    line = mmcv_ext(None)
    assert line.value.startswith('none')
    assert 'make env OPS=0' in line.remedy
    (part,) = re.findall('--no-deps (.+?)`', line.remedy)
    assert (Path(part) / 'pyproject.toml').is_file()


def test_operators_that_do_not_load(mmcv_ext):
    def load():
        raise ImportError('undefined symbol: _ZN3c10')

    line = mmcv_ext('mmcv/_ext.cpython-311-x86_64-linux-gnu.so', load)
    assert 'cannot be loaded: undefined symbol' in line.value
    assert 'make env OPS=1' in line.remedy


def test_operators_for_a_cpu_beside_a_gpu(mmcv_ext, monkeypatch):
    module = types.SimpleNamespace(
        get_compiling_cuda_version=lambda: 'not available', get_compiler_version=lambda: 'GCC'
    )
    for found in (True, False):
        torch = types.SimpleNamespace(cuda=types.SimpleNamespace(is_available=lambda f=found: f))
        monkeypatch.setattr(doctor, '_load', lambda name, torch=torch: (torch, ''))
        line = mmcv_ext('mmcv/_ext.so', lambda: module)
        assert line.value == 'compiled (CUDA: not available, compiler: GCC)'
        assert ('nvcc' in line.remedy) == found


def test_a_stand_in_that_does_not_know_this_mmcv(mmcv_ext):
    import warnings

    line = mmcv_ext(
        'mmcv/_ext.py', lambda: warnings.warn('they stand in for those of mmcv 1', stacklevel=1)
    )
    assert 'torchvision stands in' in line.value
    assert line.remedy == 'they stand in for those of mmcv 1'


def test_a_stand_in_that_cannot_be_loaded(mmcv_ext):
    def load():
        raise ImportError("No module named 'torch'")

    line = mmcv_ext('mmcv/_ext.py', load)
    assert 'torchvision stands in' in line.value
    assert "cannot be loaded: No module named 'torch'" in line.value
    assert line.remedy == '`pip install torch`'


@pytest.mark.parametrize(
    ('cuda', 'hip', 'build'),
    [('13.0', None, 'CUDA 13.0'), (None, '6.2', 'ROCm 6.2'), (None, None, 'CPU')],
)
def test_what_torch_is_built_for(cuda, hip, build, monkeypatch):
    monkeypatch.setattr(torch.version, 'cuda', cuda)
    monkeypatch.setattr(torch.version, 'hip', hip)
    assert next(doctor.devices()).value.endswith(f'torch is built for {build}')


def test_a_compiler_with_arguments(monkeypatch):
    monkeypatch.setenv('CXX', f'{sys.executable} g++')
    assert lines(doctor.devices)['C++ compiler'].value == sys.executable


def test_the_compilers_that_the_backend_takes(monkeypatch):
    monkeypatch.delenv('CXX', raising=False)
    monkeypatch.setattr(doctor.shutil, 'which', {'clang++': '/bin/clang++'}.get)
    assert lines(doctor.devices)['C++ compiler'].value == '/bin/clang++'
    monkeypatch.setattr(doctor.shutil, 'which', {}.get)
    assert lines(doctor.devices)['C++ compiler'].value.startswith('none: ')


def answer_of_pip(monkeypatch, **answer):
    done = types.SimpleNamespace(returncode=1, **{'stdout': '', 'stderr': '', **answer})
    monkeypatch.setattr(doctor.subprocess, 'run', lambda *a, **k: done)


def test_unmet_requirements(monkeypatch):
    out = (
        'mmdet 3.3.0 requires pycocotools, which is not installed.\n'
        'torchvision 0.26.0 has requirement torch==2.11.0, but you have torch 2.1.2.\n'
    )
    answer_of_pip(monkeypatch, stdout=out)
    first, second = doctor.requirements()
    assert first.remedy == "`pip install 'pycocotools'`"
    assert second.remedy == "`pip install 'torch==2.11.0'`"


def test_an_environment_without_pip(monkeypatch):
    answer_of_pip(monkeypatch, stderr='/usr/bin/python3: No module named pip\n')
    assert [line.value for line in doctor.requirements()] == ['no pip in this environment']


def test_one_failing_check_leaves_the_others(monkeypatch):
    def broken():
        raise OSError('no disk')

    monkeypatch.setattr(doctor, 'CHECKS', (broken, doctor.system))
    found = {line.name: line for line in doctor.examine()}
    assert found['broken'].value == 'this check failed: OSError: no disk'
    assert found['mmubn'].value.startswith(metadata.version('mmubn'))

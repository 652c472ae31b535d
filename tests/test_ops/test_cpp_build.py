"""Building the library of the C++ backend: compilers, the folder, and what can go wrong there."""

import os
import pwd
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mmubn.ops import cpp_build
from mmubn.ops.backend import CPP

WHY_NOT = CPP.why_not(torch.zeros(1, 1, 1, 1), 3)
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)

FAILED = subprocess.CompletedProcess([], 1, stdout='', stderr='')


@pytest.fixture
def fresh(monkeypatch):
    """As in a process that has loaded nothing."""
    cpp_build.library.cache_clear()
    yield monkeypatch
    cpp_build.library.cache_clear()


def test_no_compiler(fresh, tmp_path):
    fresh.setenv('CXX', str(tmp_path / 'none'))
    with pytest.raises(cpp_build.BuildError, match='there is no C\\+\\+ compiler'):
        cpp_build.library('float', 3)


def test_compiler_that_fails(fresh, tmp_path):
    fresh.setenv('CXX', '/bin/false')
    fresh.setenv('MMUBN_CACHE', str(tmp_path / 'cache'))
    with pytest.raises(cpp_build.BuildError, match='false failed'):
        cpp_build.library('float', 3)
    assert not list((tmp_path / 'cache').iterdir())  # nothing half made


def test_what_a_killed_build_left_goes(fresh, tmp_path):
    folder = tmp_path / 'cache'
    folder.mkdir(mode=0o700)
    for name, age in (('building_old.so', 3600), ('building_new.so', 60), ('step_old.so', 3600)):
        (folder / name).touch()
        os.utime(folder / name, times=(time.time() - age,) * 2)
    fresh.setenv('CXX', '/bin/false')
    fresh.setenv('MMUBN_CACHE', str(folder))
    with pytest.raises(cpp_build.BuildError, match='false failed'):
        cpp_build.library('float', 3)
    assert {path.name for path in folder.iterdir()} == {'building_new.so', 'step_old.so'}


def test_compiler_with_arguments(fresh, tmp_path):
    """As ``ccache g++``; what it is called with is all of it, and a path may have spaces."""
    spaced = tmp_path / 'a compiler'
    spaced.write_text('#!/bin/sh\n')
    spaced.chmod(0o700)
    for given, command in (('env c++', ['env', 'c++']), (str(spaced), [str(spaced)])):
        fresh.setenv('CXX', given)
        assert cpp_build._compiler() == [shutil.which(command[0]), *command[1:]]
    calls = []
    fresh.setenv('CXX', 'env -i c++')
    fresh.setenv('MMUBN_CACHE', str(tmp_path / 'cache'))
    fresh.setattr(cpp_build, '_run', lambda command: calls.append(command) or FAILED)
    with pytest.raises(cpp_build.BuildError, match='env failed'):
        cpp_build.library('float', 3)
    assert [call[1:3] for call in calls] == [['-i', 'c++']] * 2


def test_linker_that_fails(fresh, tmp_path):
    """Its line is the reason, as of a compiler without OpenMP's library or of a full disk."""
    compiler = tmp_path / 'compiler'
    compiler.write_text(
        '#!/bin/sh\n'
        'echo "a.cpp: warning: cannot unroll\nld: cannot find -lomp\nerror: ld returned 1" >&2\n'
        'exit 1\n'
    )
    compiler.chmod(0o700)
    fresh.setenv('CXX', str(compiler))
    fresh.setenv('MMUBN_CACHE', str(tmp_path / 'cache'))
    with pytest.raises(cpp_build.BuildError, match='compiler failed: ld: cannot find -lomp'):
        cpp_build.library('float', 3)


def test_folder_that_others_can_write_to(fresh, tmp_path):
    tmp_path.chmod(0o777)
    fresh.setenv('MMUBN_CACHE', str(tmp_path))
    with pytest.raises(cpp_build.BuildError, match='can be written by other users'):
        cpp_build.library('float', 3)


def test_folder_of_root_serves_all_users(fresh, tmp_path):
    """As in the image of a container that runs under another number."""
    fresh.setenv('MMUBN_CACHE', str(tmp_path / 'cache'))
    fresh.setattr(cpp_build.ctypes, 'CDLL', str)
    owner = tmp_path.stat().st_uid
    fresh.setattr(cpp_build.Path, 'exists', lambda self: True)  # it is built already
    for user, owned_by, served in ((owner, owner, True), (4321, 0, True), (4321, 1234, False)):
        cpp_build.library.cache_clear()
        fresh.setattr(cpp_build.os, 'getuid', lambda user=user: user)
        status = os.stat_result((0o40755, 0, 0, 0, owned_by, 0, 0, 0, 0, 0))
        fresh.setattr(cpp_build.Path, 'stat', lambda self, status=status, **_: status)
        if served:
            cpp_build.library('float', 3)
            continue
        with pytest.raises(cpp_build.BuildError, match='belongs to'):
            cpp_build.library('float', 3)


def test_what_an_editor_leaves_beside_the_sources(fresh, tmp_path):
    shutil.copytree(cpp_build._SOURCES, tmp_path / 'cpp')
    (tmp_path / 'cpp' / '.ipynb_checkpoints').mkdir()
    fresh.setattr(cpp_build, '_SOURCES', tmp_path / 'cpp')
    fresh.setattr(cpp_build, '_build', lambda command, path: path.touch())
    fresh.setattr(cpp_build.ctypes, 'CDLL', Path)
    fresh.setenv('MMUBN_CACHE', str(tmp_path / 'cache'))
    assert cpp_build.library('float', 3).exists()


@pytest.mark.skipif(os.name != 'posix' or os.getuid() == 0, reason='root can write anywhere')
def test_folder_that_cannot_be_written(fresh, tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    fresh.setenv('MMUBN_CACHE', str(tmp_path))
    with pytest.raises(cpp_build.BuildError, match='cannot be written'):
        cpp_build.library('float', 3)


def test_folder_with_a_relative_name(fresh, tmp_path):
    """Of ``MMUBN_CACHE=.`` a bare name would be left, which is no path for the loader."""
    fresh.chdir(tmp_path)
    fresh.setenv('MMUBN_CACHE', '.')
    fresh.setattr(cpp_build, '_build', lambda command, path: path.touch())
    fresh.setattr(cpp_build.ctypes, 'CDLL', Path)
    assert cpp_build.library('float', 3).parent == tmp_path


def test_power_cut_leaves_no_half_of_a_library(fresh, tmp_path):
    """What was written is on the disk before it gets the name that is looked for."""
    synced = []
    fresh.setattr(cpp_build.os, 'fsync', lambda file: synced.append(os.fstat(file).st_ino))

    def compile_to(command):
        if '-o' in command:
            Path(command[-1]).write_text('library')
        return subprocess.CompletedProcess(command, 0, stdout='', stderr='')

    fresh.setattr(cpp_build, '_run', compile_to)
    fresh.setattr(cpp_build.ctypes, 'CDLL', Path)
    fresh.setenv('MMUBN_CACHE', str(tmp_path))
    assert synced == [cpp_build.library('float', 3).stat().st_ino]


def test_user_without_a_home(fresh):
    """As in a container that runs under a number of its own: one line, and torch serves."""

    def unknown(number):
        raise KeyError(number)

    for name in ('HOME', 'MMUBN_CACHE', 'XDG_CACHE_HOME'):
        fresh.delenv(name, raising=False)
    fresh.setattr(pwd, 'getpwuid', unknown)
    with pytest.raises(cpp_build.BuildError, match=r'~/\.cache/mmubn cannot be made .*MMUBN_CACHE'):
        cpp_build.library('float', 3)


def test_package_without_the_sources(fresh, tmp_path):
    """As in a zip file, and in applications that take Python's files alone."""
    fresh.setattr(cpp_build, '_SOURCES', tmp_path / 'cpp')
    with pytest.raises(cpp_build.BuildError, match=r'the C\+\+ sources cannot be read: .*cpp'):
        cpp_build.library('float', 3)


def test_processors_that_share_a_folder_share_no_library(fresh, tmp_path):
    fresh.setenv('MMUBN_CACHE', str(tmp_path))
    fresh.setattr(cpp_build, '_build', lambda command, path: path.touch())
    fresh.setattr(cpp_build.ctypes, 'CDLL', str)
    paths = []
    for flags in ('avx2', 'avx2 avx512f', 'avx2'):
        fresh.setattr(cpp_build, '_processor', lambda flags=flags: f'flags : {flags}')
        cpp_build.library.cache_clear()
        paths.append(cpp_build.library('float', 3))
    assert paths[0] == paths[2] != paths[1]


def test_without_a_compiler_torch_serves_and_one_line_says_so(tmp_path):
    script = (
        'import torch, mmubn\n'
        'for _ in range(2):\n'
        '    mmubn.UBN(3)(torch.randn(2, 3, 4, 4)).sum().backward()\n'
        "try: mmubn.UBN(3, backend='cpp')(torch.randn(2, 3, 4, 4))\n"
        'except RuntimeError as error: print(error)\n'
    )
    environment = {**os.environ, 'CXX': '/bin/false', 'MMUBN_CACHE': str(tmp_path / 'cache')}
    result = subprocess.run(
        [sys.executable, '-c', script], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stderr.splitlines() if 'mmubn' in line]
    assert len(lines) == 1
    assert 'plain torch replaces the cpp backend of mmubn: /bin/false failed' in lines[0]
    assert result.stdout.startswith("backend='cpp' cannot be used: /bin/false failed")


@pytest.mark.slow
def test_two_processes_build_at_once(tmp_path):
    """Each takes a whole library, and one of each lies there."""
    script = "import mmubn, torch; print(mmubn.UBN(3, backend='cpp')(torch.ones(2, 3, 4, 4)).sum())"
    environment = {**os.environ, 'MMUBN_CACHE': str(tmp_path / 'cache')}
    workers = [
        subprocess.Popen([sys.executable, '-c', script], env=environment, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    outputs = [worker.communicate()[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    assert outputs[0] == outputs[1]
    assert len(list((tmp_path / 'cache').iterdir())) == 1

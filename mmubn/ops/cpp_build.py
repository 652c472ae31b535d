"""Builds the C++ of :mod:`mmubn.ops.cpp_backend` on first use and keeps it in a cache.

One call of a C++ compiler makes a library of one dtype and kernel size for the processor at hand,
in about ten seconds. It lies in ``$MMUBN_CACHE``, else in ``mmubn`` under ``$XDG_CACHE_HOME`` or
``~/.cache``. Its name says the sources, the compiler, the flags and the processor's abilities,
so that a changed one is built anew and machines that share a home folder do not meet
instructions that they lack. A library is written whole or not at all, into a folder that no
other user but root can write to.
"""

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import List

_SOURCES = Path(__file__).with_name('cpp')
# Not -ffast-math: a library linked with it makes the whole process flush denormals.
_FLAGS = ('-O3', '-std=c++17', '-shared', '-fPIC', '-fopenmp', '-fno-math-errno')
_NATIVE = {'aarch64': '-mcpu=native', 'arm64': '-mcpu=native'}
_SECONDS = 600


class BuildError(RuntimeError):
    """There is no library, and why, in one line."""


@functools.cache
def library(dtype: str, kernel_size: int) -> ctypes.CDLL:
    """The library for a dtype (``float``, ``double``, ``bf16``) and k, built if need be.

    Raises:
        BuildError: There is no compiler, it fails, or the sources cannot be read or a library
            not be written.
    """
    compiler = _compiler()
    command = [*compiler, *_FLAGS, _NATIVE.get(platform.machine(), '-march=native')]
    command += [f'-DUBN_T={"ubn::bf16" if dtype == "bf16" else dtype}', f'-DUBN_K={kernel_size}']
    try:
        sources = [path for path in sorted(_SOURCES.iterdir()) if path.suffix in ('.cpp', '.h')]
        contents = [path.read_bytes() for path in sources]
    except OSError as error:  # in a zip file, or left out by what packed an application
        raise BuildError(f'the C++ sources cannot be read: {error}') from error
    about = '\n'.join([*command, _version(compiler), _processor()]).encode()
    key = hashlib.sha256(b'\0'.join([about, *contents])).hexdigest()[:20]
    path = _folder() / f'step_{dtype}_k{kernel_size}_{key}.so'
    if not path.exists():
        _build(command, path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(
            f'{path} cannot be loaded ({error}); delete it, or name another folder by MMUBN_CACHE'
        ) from error


def _compiler() -> List[str]:
    """The compiler, with the arguments that ``$CXX`` may have, as in ``ccache g++``."""
    given = os.environ.get('CXX', '')
    # A path with spaces is one name.
    for command in [[given], given.split()] if given.strip() else [['c++'], ['g++'], ['clang++']]:
        found = shutil.which(command[0])
        if found:
            return [found, *command[1:]]
    raise BuildError(f'there is no C++ compiler ({given or "c++, g++, clang++"})')


def _version(compiler: List[str]) -> str:
    return _run([*compiler, '--version']).stdout


def _processor() -> str:
    """What says which instructions there are."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return f'{platform.machine()} {platform.processor()}'
    wanted = ('flags', 'Features', 'model name', 'CPU part')
    return '\n'.join(sorted({line for line in lines if line.startswith(wanted)}))


def _folder() -> Path:
    """A folder that only this user, or root, can write to."""
    home = os.environ.get('MMUBN_CACHE')
    base = Path(home or os.environ.get('XDG_CACHE_HOME') or '~/.cache')
    folder = base if home else base / 'mmubn'
    try:
        folder = folder.expanduser().absolute()  # a bare name is looked up where libraries are
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
    except (OSError, RuntimeError, KeyError) as error:  # the last two: a user without a home
        raise BuildError(f'{folder} cannot be made ({error}); MMUBN_CACHE names another') from error
    # Root's may hold what was built for all users, as in a container's image.
    if hasattr(os, 'getuid') and (status.st_uid not in (0, os.getuid()) or status.st_mode & 0o022):
        raise BuildError(
            f'{folder} belongs to or can be written by other users; MMUBN_CACHE names another'
        )
    return folder


def _build(command: List[str], path: Path) -> None:
    try:
        handle, name = tempfile.mkstemp(suffix='.so', prefix='building_', dir=path.parent)
    except OSError as error:
        raise BuildError(f'{path.parent} cannot be written: {error}') from error
    os.close(handle)
    _remove_abandoned(path.parent)
    try:
        result = _run([*command, str(_SOURCES / 'step.cpp'), '-o', name])
        if result.returncode:
            lines = (result.stderr or result.stdout).strip().splitlines()
            # The linker says what it cannot do, and the compiler after it that there was an error.
            reasons = re.compile('error|cannot|failed|not found')
            told = [line for line in lines if reasons.search(line) and 'warning:' not in line]
            first = (told or lines or [''])[0]
            raise BuildError(f'{command[0]} failed: {first or f"exit code {result.returncode}"}')
        with open(name, 'rb') as file:  # on the disk first, lest a power cut leave half of it
            os.fsync(file.fileno())
        os.replace(name, path)  # whole, also where several processes build at once
    finally:
        Path(name).unlink(missing_ok=True)


def _remove_abandoned(folder: Path) -> None:
    """Takes away what processes left that were killed while they built."""
    for file in folder.glob('building_*.so'):
        with suppress(OSError):  # another process may take it away
            if time.time() - file.stat().st_mtime > 2 * _SECONDS:
                file.unlink()


def _run(command: List[str]) -> subprocess.CompletedProcess:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f'{command[0]} failed: {error}') from error

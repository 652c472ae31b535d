"""What the environment is and what in it does not fit: ``python -m mmubn.doctor``.

A bug report pastes its output. It needs nothing that could be missing: run by its path,
``python mmubn/doctor.py``, it works with a Python that has no torch.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import io
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path
from typing import Callable, Iterator, List, Tuple

ROOT = Path(__file__).parent
# Import names, and the distributions that bring them: one of each may be installed.
PACKAGES = {
    'torch': ['torch'],
    'torchvision': ['torchvision'],
    'numpy': ['numpy'],
    'mmengine': ['onedl-mmengine', 'mmengine', 'mmengine-lite'],
    'mmcv': ['onedl-mmcv', 'mmcv', 'mmcv-lite', 'mmcv-full'],
    'mmdet': ['onedl-mmdetection', 'mmdet'],
    'mmpretrain': ['onedl-mmpretrain', 'mmpretrain'],
}
STAND_IN = 'mmcv-torchvision-ops'
_PARTS = (ROOT / '.mim/tools/mmcv_ops', ROOT.parent / 'tools/mmcv_ops')
_PART = next((part for part in _PARTS if part.exists()), 'tools/mmcv_ops of the repository')
TAKE_STAND_IN = f'`make env OPS=0`, or `pip install --no-deps {_PART}`'
_SAME_LINE = (
    'install torch and torchvision of one release, from one index: `pip install --force-reinstall '
    "'torch==2.11.0' 'torchvision==0.26.0'`, or 2.1.2 and 0.16.2"
)
# What a failed import says, and what mends it.
REMEDIES = (
    (r"No module named 'mmcv\._ext'", TAKE_STAND_IN),
    (r'libGL|libgthread', '`pip install --no-deps --force-reinstall opencv-python-headless`'),
    (r'[Nn]um[Pp]y', "`pip install 'numpy<2'`, or a newer release of the package that fails"),
    (r'torchvision::|undefined symbol', _SAME_LINE),
    (r'MMCV==\S+ is used', 'install the mmcv that the message asks for'),
    (r"No module named 'cv2", '`pip install opencv-python-headless`'),
    (r"No module named 'yaml", '`pip install PyYAML`'),
    (r"No module named 'PIL", '`pip install Pillow`'),
    (r"No module named '(\w+)", r'`pip install \1`'),
)


@dataclasses.dataclass
class Line:
    """One fact, and what to do about it if it does not fit."""

    name: str
    value: str
    remedy: str = ''


def _load(name: str):
    """The module and '', or None and why it cannot be imported, in one line."""
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter('ignore')
            return importlib.import_module(name), ''
    except Exception as error:  # whatever a broken package raises
        return None, f'{type(error).__name__}: {" ".join(str(error).split())}'


def _remedy(reason: str) -> str:
    for pattern, remedy in REMEDIES:
        match = re.search(pattern, reason)
        if match:
            return match.expand(remedy) if match.groups() else remedy
    return 'reinstall it: `pip install --force-reinstall --no-deps` with its name and version'


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ''


def system() -> Iterator[Line]:
    """Python, the platform, and this package."""
    old = 'install Python 3.9 or newer; 3.11 is tested most' if sys.version_info < (3, 9) else ''
    yield Line('python', f'{platform.python_version()}, {platform.platform()}', old)
    version = re.search(r"'(.+)'", (ROOT / 'version.py').read_text()).group(1)
    yield Line('mmubn', f'{version} in {ROOT}')


def packages() -> Iterator[Line]:
    """Version and origin of each package, and whether it can be imported."""
    for name, distributions in PACKAGES.items():
        found = {d: _version(d) for d in distributions if _version(d)}
        value = ', '.join(v if d == name else f'{d} {v}' for d, v in found.items())
        value = value or 'not installed'
        needed = name in ('torch', 'numpy')
        if not found and importlib.util.find_spec(name) is None:
            yield Line(name, value, f'`pip install {name}`' if needed else '')
            continue
        if len(found) > 1:
            remedy = f'keep one: `pip uninstall {" ".join(found)}`, then install that one again'
            yield Line(name, value, remedy)
            continue
        module, reason = _load(name)
        if module is None:
            yield Line(name, f'{value}, cannot be imported: {reason}', _remedy(reason))
        elif not found and getattr(module, '__file__', None) is None:
            yield Line(name, 'a folder without the package', f'install {name} again')
        else:
            yield Line(name, value, _misfit(name, module))


def _misfit(name: str, module) -> str:
    if name == 'torch':
        if tuple(map(int, module.__version__.split('.')[:2])) < (2, 1):
            return 'mmubn needs torch 2.1 or newer'
        try:
            module.zeros(1).numpy()
        except RuntimeError:
            return (
                f"torch {module.__version__} does not work with this NumPy: `pip install 'numpy<2'`"
            )
    return ''


def operators() -> Iterator[Line]:
    """Whether mmcv's operators are compiled or stood in for."""
    if not any(map(_version, PACKAGES['mmcv'])):
        return
    name = 'operators'
    try:
        spec = importlib.util.find_spec('mmcv._ext')
    except Exception:  # mmcv itself cannot be imported, which packages() tells
        return
    if spec is None:
        yield Line(name, 'none: detectors cannot be imported', TAKE_STAND_IN)
        return
    stands_in = spec.origin.endswith('.py')
    of_torchvision = f'torchvision stands in ({STAND_IN} {_version(STAND_IN)})'
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        try:
            module = importlib.import_module('mmcv._ext')
        except Exception as error:  # compiled for another torch: whatever the loader raises
            reason = ' '.join(str(error).split())
            if stands_in:
                yield Line(name, f'{of_torchvision}, cannot be loaded: {reason}', _remedy(reason))
                return
            yield Line(
                name,
                f'compiled, cannot be loaded: {reason}',
                f'compile them again, `make env OPS=1`, or take torchvision: {TAKE_STAND_IN}',
            )
            return
    if stands_in:
        told = [str(w.message) for w in caught if 'stand in for' in str(w.message)]
        yield Line(name, of_torchvision, told[0] if told else '')
        return
    cuda = module.get_compiling_cuda_version()
    on_gpu = getattr(_load('torch')[0], 'cuda', None)
    misfit = cuda == 'not available' and on_gpu is not None and on_gpu.is_available()
    yield Line(
        name,
        f'compiled (CUDA: {cuda}, compiler: {module.get_compiler_version()})',
        'they are for CPU alone: compile them where nvcc is found, `make env OPS=1`, or take '
        f'torchvision: {TAKE_STAND_IN}'
        if misfit
        else '',
    )


def devices() -> Iterator[Line]:
    """The GPUs that torch sees, and Triton."""
    torch, _ = _load('torch')
    if torch is not None:
        cuda, rocm = torch.version.cuda, torch.version.hip
        target = f'CUDA {cuda}' if cuda else f'ROCm {rocm}' if rocm else 'CPU'
        build = f'torch is built for {target}'
        if torch.cuda.is_available():
            count = torch.cuda.device_count()
            names = {torch.cuda.get_device_name(i) for i in range(count)}
            yield Line('GPU', f'{count} × {", ".join(sorted(names))}; {build}')
        else:
            remedy = ''
            if shutil.which('nvidia-smi'):
                remedy = (
                    'nvidia-smi is here but torch sees no GPU: the driver is too old for that CUDA '
                    'version, or torch came from a CPU index'
                )
            yield Line('GPU', f'none; {build}', remedy)
    if importlib.util.find_spec('triton') is None:
        yield Line('triton', 'not installed')
    else:
        triton, reason = _load('triton')  # its distributions have several names
        yield Line('triton', getattr(triton, '__version__', '') or f'cannot be imported: {reason}')
    given = os.environ.get('CXX', '').strip()  # which may have arguments
    names = (given, given.split()[0]) if given else ('c++', 'g++', 'clang++')
    compiler = next(filter(None, map(shutil.which, names)), None)
    yield Line('C++ compiler', compiler or 'none: the backend cpp and OPS=1 need one')


def backends() -> Iterator[Line]:
    """Which backend makes UBN's steps here, and why."""
    torch, _ = _load('torch')
    if torch is None:
        return
    backend, reason = _load('mmubn.ops.backend')
    if backend is None:
        yield Line('backend', f'mmubn cannot be imported: {reason}', _remedy(reason))
        return
    for name, available, why in backend.describe():
        yield Line(f'backend {name}', f'{"yes" if available else "no"}: {why}')


def requirements() -> Iterator[Line]:
    """What pip finds unmet among the installed packages' requirements."""
    # Not find_spec('pip'): setuptools answers that, and puts a warning on the user's screen.
    done = subprocess.run([sys.executable, '-m', 'pip', 'check'], capture_output=True, text=True)
    if 'No module named pip' in done.stderr:
        yield Line('pip check', 'no pip in this environment')
        return
    for line in done.stdout.splitlines() if done.returncode else ():
        need = re.search(r'requires (\S+?),', line) or re.search(
            r'has requirement (.+?), but', line
        )
        remedy = f'`pip install {need.group(1)!r}`' if need else 'see `pip check`'
        yield Line('pip check', line, remedy)


CHECKS: Tuple[Callable[[], Iterator[Line]], ...] = (
    system,
    packages,
    operators,
    devices,
    backends,
    requirements,
)


def examine() -> List[Line]:
    """Every fact, in the order of :data:`CHECKS`."""
    lines = []
    for check in CHECKS:
        try:
            lines.extend(check())
        except Exception as error:  # the other checks are still worth having
            reason = f'this check failed: {type(error).__name__}: {error}'
            lines.append(Line(check.__name__, reason, 'report it, with all of this'))
    return lines


def main() -> int:
    """Prints the facts, then the remedies.

    Returns:
        int: 1 if something does not fit, else 0.
    """
    lines = examine()
    width = max(len(line.name) for line in lines)
    for line in lines:
        print(f'{"!" if line.remedy else " "} {line.name:{width}}  {line.value}')
    misfits = [line for line in lines if line.remedy]
    print('\nWhat does not fit:' if misfits else '\nEverything fits.')
    for line in misfits:
        print(f'- {line.name}: {line.remedy}')
    return bool(misfits)


if __name__ == '__main__':
    if not __package__:  # run by its path: Python put mmubn/ first, which holds no top-level module
        sys.path[0] = str(ROOT.parent)
    sys.exit(main())

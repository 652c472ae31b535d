"""What a GPU can show of mmubn, in one call of ten minutes: kernel tests, then benchmarks.

    python tools/gpu_check.py                 # rows go to the CSVs of tools/benchmarks
    python tools/gpu_check.py --minutes 30    # where kernels compile slowly

It needs torch, triton, torchvision and pytest, and no installation of mmubn: its steps get the
checkout by PYTHONPATH. With pytest-xdist the tests run side by side, on a GPU mostly compilations.
They have half of the time at most. The benchmarks run in the order of BENCHMARKS; what the time
does not reach is named. Exits with 1 where there is no GPU, the kernels cannot run on it, a test
failed or a step was not done.
"""

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Optional, Sequence

ROOT = Path(__file__).resolve().parents[1]
STOPPING = 25  # seconds that an interrupted step has to end in
TESTS = [
    'tests/test_ops/test_triton_backend.py',
    'tests/test_ops/test_cuda.py',
    'tests/test_ops/test_backend.py',
]
_DTYPES, _LAYOUTS = ('bfloat16', 'float32'), ('channels_last', 'contiguous')
_ALL = ['--dtypes', *_DTYPES, '--layouts', *_LAYOUTS]
_COMPILED = ['ubn', 'rbn', 'bnet', 'iebn']
_NORMS = ['bn', *_COMPILED, 'literal']
_LAYERS = ['32,64,56,56', '32,256,14,14', '128,64,32,32', '2,256,100,152']
_SMALL = ['64,512,4,4', '4,16,4,4']
_MODEL = [*_ALL, '--norms', 'bn', 'ubn', '--model']
# Tools with their arguments, one run after the other.
BENCHMARKS = [
    ('benchmark_kernels', ['--shapes', *_LAYERS]),
    ('benchmark_norm', ['--norms', *_NORMS, '--shapes', *_LAYERS, *_SMALL, *_ALL]),
    ('benchmark_norm', [*_MODEL, 'resnet50', '--shapes', '32,3,224,224']),
    ('benchmark_norm', [*_MODEL, 'mask_rcnn_r50', '--shapes', '2,3,800,1344']),
    ('benchmark_norm', [*_MODEL, 'resnet18_small', '--shapes', '128,3,32,32']),
    ('benchmark_kernels', ['--tiles', '--shapes', *_LAYERS[:2]]),
    ('benchmark_norm', [*_MODEL, 'resnet50', '--shapes', '256,3,224,224']),
    ('benchmark_norm', [*_MODEL, 'mask_rcnn_r50', '--shapes', '8,3,800,1344']),
]


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Runs the tests, then the benchmarks that the time allows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--minutes', type=float, default=10, help='time of the call (%(default)s)')
    parser.add_argument('--out', type=Path, help="folder of the CSVs (the tools' own)")
    args = parser.parse_args(argv)
    start = time.monotonic()
    import torch  # only now, as its time counts: on a fresh machine up to half a minute

    if not torch.cuda.is_available():
        print('gpu_check: torch sees no GPU, so there is nothing to check', file=sys.stderr)
        sys.exit(1)
    sys.path.insert(0, str(ROOT))
    from mmubn.ops.backend import TRITON

    reason = TRITON.why_not(torch.zeros(1, 1, 1, 1, device='cuda'), 3)
    if reason:  # plain torch would be measured in their place
        print(f'gpu_check: the kernels cannot run here: {reason}', file=sys.stderr)
        sys.exit(1)
    end = start + 60 * args.minutes - STOPPING
    # Verbose, so that what failed is named though the time ends.
    pytest = [sys.executable, '-m', 'pytest', '-v', '-p', 'no:cacheprovider']
    if importlib.util.find_spec('xdist'):
        pytest += ['-n', str(min(os.cpu_count() or 1, 12))]
    if importlib.util.find_spec('pytest_timeout'):
        pytest += ['--timeout', '120']
    pytest += ['-m', 'not slow', *TESTS]
    undone = [] if _finish((start + end) / 2, _start(pytest)) else [pytest]
    for tool, arguments in BENCHMARKS:
        command = [sys.executable, str(ROOT / 'tools' / f'{tool}.py'), *arguments]
        if tool == 'benchmark_norm':
            command += ['--repeats', '15']
            # A model's few kernels are compiled sooner than the model is built.
            if '--model' not in arguments and time.monotonic() < end:
                _compile([*command, '--repeats', '1'], end)
        if args.out:
            command += ['--csv', str(args.out.resolve() / f'{tool}.csv')]
        if time.monotonic() >= end or not _finish(end, _start(command)):
            undone.append(command)
    for command in undone:
        print('failed or out of time:', ' '.join(command))
    sys.exit(1 if undone else 0)


def _compile(command: Sequence[str], end: float) -> None:
    """Fills Triton's cache, many processes at once: one alone would compile for minutes."""
    started = []
    with tempfile.TemporaryDirectory() as folder:
        for norm, dtype, layout in product(_COMPILED, _DTYPES, _LAYOUTS):
            own = ['--norms', norm, '--dtypes', dtype, '--layouts', layout]
            own += ['--csv', f'{folder}/{norm}_{dtype}_{layout}.csv']
            started.append(_start([*command, *own], quiet=True))
        _finish(end, *started)


def _start(command: Sequence[str], quiet: bool = False) -> subprocess.Popen:
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    environment = {**os.environ, 'TRITON_INTERPRET': '0', 'PYTHONPATH': paths}
    output = subprocess.DEVNULL if quiet else None
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)


def _finish(end: float, *processes: subprocess.Popen) -> bool:
    """Whether they ended well in time; what they measured before is kept."""
    while time.monotonic() < end and any(process.poll() is None for process in processes):
        time.sleep(0.1)
    late = [process for process in processes if process.poll() is None]
    for process in late:
        process.send_signal(signal.SIGINT)
    last = time.monotonic() + STOPPING
    for process in late:
        try:
            process.wait(max(last - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            process.kill()
    return not late and all(process.returncode == 0 for process in processes)


if __name__ == '__main__':
    main()

"""What a GPU can show of mmubn, in one call of ten minutes: kernel tests, then benchmarks.

    python tools/gpu_check.py                 # rows go to tools/benchmarks/benchmark_norm.csv
    python tools/gpu_check.py --minutes 30    # where kernels compile slowly

It needs torch, triton, torchvision and pytest, and no installation of mmubn: its steps get the
checkout by PYTHONPATH. The steps run in the order
of STEPS; what the time does not reach is named. Exits with 1 where there is no GPU, a test
failed or a step was not done.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import List, Optional, Sequence

import torch

ROOT = Path(__file__).resolve().parents[1]
# Side by side: on a GPU each is mostly the compilation of kernels, on a core of its own.
TESTS = [
    ['tests/test_ops/test_triton_backend.py', '-k', 'step_by_shape'],
    ['tests/test_ops/test_triton_backend.py', '-k', 'step_by_layer'],
    ['tests/test_ops/test_triton_backend.py', '-k', 'gate_and'],
    ['tests/test_ops/test_triton_backend.py', '-k', 'not step_by and not gate_and'],
    ['tests/test_ops/test_cuda.py'],
    ['tests/test_layers/test_backend.py'],
]
_ALL = ['--dtypes', 'bfloat16', 'float32', '--layouts', 'channels_last', 'contiguous']
_LAYERS = ['32,64,56,56', '32,256,14,14', '128,64,32,32', '2,256,100,152']
_R50 = ['--model', 'resnet50', '--norms', 'bn', 'ubn', '--shapes']
_MASK_RCNN = ['--model', 'mask_rcnn_r50', '--norms', 'bn', 'ubn', '--shapes']
# Arguments of tools/benchmark_norm.py, one run after the other.
STEPS = [
    ['--norms', 'bn', 'ubn', 'rbn', 'bnet', 'literal', '--shapes', *_LAYERS, *_ALL],
    [*_R50, '32,3,224,224', *_ALL],
    [*_MASK_RCNN, '2,3,800,1344', *_ALL],
    [*_R50, '256,3,224,224', *_ALL],
    [*_MASK_RCNN, '8,3,800,1344', *_ALL],
]


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Runs the tests, then the benchmarks that the time allows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--minutes', type=float, default=10, help='of the call (%(default)s)')
    parser.add_argument('--csv', type=Path, help="the rows' file (benchmark_norm.py's own)")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print('gpu_check: torch sees no GPU, so there is nothing to check', file=sys.stderr)
        sys.exit(1)
    end = time.monotonic() + 60 * args.minutes - 15  # to stop in
    pytest = [sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider']
    tests = [_start([*pytest, '-m', 'not slow', *arguments]) for arguments in TESTS]
    undone = [test.args for test in tests if not _finish(test, end)]
    benchmark = [sys.executable, str(ROOT / 'tools' / 'benchmark_norm.py'), '--repeats', '15']
    benchmark += ['--csv', str(args.csv.resolve())] if args.csv else []
    for arguments in STEPS:
        step = _start([*benchmark, *arguments])
        if not _finish(step, end):
            undone.append(step.args)
    for command in undone:
        print('failed or out of time:', ' '.join(command))
    sys.exit(1 if undone else 0)


def _start(command: List[str]) -> subprocess.Popen:
    environment = {**os.environ, 'TRITON_INTERPRET': '0', 'PYTHONPATH': str(ROOT)}
    return subprocess.Popen(command, cwd=ROOT, env=environment)


def _finish(process: subprocess.Popen, end: float) -> bool:
    """Whether it ended well in time; what it measured before is kept."""
    try:
        return process.wait(max(end - time.monotonic(), 0)) == 0
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
        return False


if __name__ == '__main__':
    main()

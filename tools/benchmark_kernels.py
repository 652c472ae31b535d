"""Times UBN's Triton kernels one by one on a GPU, beside a copy; --tiles also tries other tiles.

    python tools/benchmark_kernels.py
    python tools/benchmark_kernels.py --tiles --shapes 32,64,56,56 --dtypes bfloat16
    python tools/benchmark_kernels.py --host    # what the launches cost Python; needs no GPU

It needs torch and triton alone. In a checkout that is not installed, set PYTHONPATH=. first. Times
are medians on the device, by torch's profiler. A table for each setting goes to stdout, its rows to
a CSV. Tiles that are faster for most settings belong into Tiles of mmubn/ops/triton_backend.py.
"""

import argparse
import sys
import traceback
from itertools import product
from pathlib import Path
from typing import Optional, Sequence

import torch

from mmubn.benchmark.host import host_table, host_us
from mmubn.benchmark.kernels import COLUMNS, OTHER_TILES, compile_all, table, time_kernels
from mmubn.benchmark.norm import BASE_SHAPES, LAYOUTS, parse_shape
from mmubn.benchmark.rows import append_csv, check_csv, describe_run
from mmubn.cli.errors import CommandError, command
from mmubn.ops.triton_backend import Tiles
from mmubn.writing import check_file

CSV = Path(__file__).resolve().parent / 'benchmarks' / 'benchmark_kernels.csv'


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--host', action='store_true', help="time the host's share alone, with no GPU"
    )
    parser.add_argument('--tiles', action='store_true', help='try other tiles too')
    parser.add_argument(
        '--shapes', nargs='+', type=parse_shape, metavar='N,C,H,W', default=BASE_SHAPES
    )
    parser.add_argument(
        '--dtypes',
        nargs='+',
        choices=['bfloat16', 'float16', 'float32'],
        default=['bfloat16', 'float32'],
    )
    parser.add_argument('--layouts', nargs='+', choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument('--csv', type=Path, default=CSV, help='rows are appended (%(default)s)')
    parser.add_argument('--device', type=torch.device, default='cuda')
    return parser.parse_args(argv)


@command
def main(argv: Optional[Sequence[str]] = None) -> None:
    """Reads the command line, compiles, measures and reports."""
    args = parse_args(argv)
    if args.host:
        print(host_table(host_us()))
        return
    if args.device.type != 'cuda' or not torch.cuda.is_available():
        raise CommandError(f'--device: torch sees no GPU {args.device}')
    check_file('--csv', args.csv)
    check_csv(args.csv, COLUMNS)
    torch.cuda.set_device(args.device.index or 0)
    device = args.device
    run = describe_run(device)
    print(', '.join(f'{key} {value}' for key, value in run.items()), flush=True)
    tiles = OTHER_TILES if args.tiles else []
    every = list(product(args.shapes, args.dtypes, args.layouts))
    print(f'compiling the kernels of {len(every)} settings', flush=True)
    compile_all(every, [Tiles(), *tiles], device)
    failed = False
    for setting in every:
        try:
            rows = time_kernels(run, setting, tiles, device)
        except Exception:  # whatever it is, the other settings may go well
            traceback.print_exc()
            failed = True
            continue
        append_csv(args.csv, rows, COLUMNS)
        print(table(rows), flush=True)
    if failed:
        sys.exit(1)


if __name__ == '__main__':
    main()

"""Times norm layers beside BatchNorm and beside the literal composition of UBN.

    python tools/benchmark_norm.py --threads 2              # layers
    python tools/benchmark_norm.py --model resnet50         # whole training steps
    python tools/benchmark_norm.py --similarity             # from 8 to 1024 images
    python tools/benchmark_norm.py --plot-only --plot ratios.png

It needs torch alone (--model torchvision, --plot matplotlib). In a checkout that is not installed,
set PYTHONPATH=. first. The norms of a setting run in turn, round after round; times are medians,
ratios are medians of the ratios within a round. Tables and goals go to stdout, progress to stderr,
and each setting's rows to a CSV as it ends.

The norms: bn is nn.BatchNorm2d; ubn has the paper's gate, ubn_no_gate has none (fct=None). Both
choose their backend themselves; ubn_torch, ubn_cpp and ubn_triton name it. bn_compiled and
ubn_compiled are under torch.compile; literal is UBN's equations under autograd with the N x N
matrix of similarities; rbn, bnet and iebn are the layers of that name.
"""

import argparse
import sys
from pathlib import Path
from typing import Optional, Sequence

import torch

from mmubn.benchmark.norm import LAYOUTS, Bench, fill_in, parse_shape, run_all
from mmubn.benchmark.plot import check_picture, plot
from mmubn.benchmark.report import goals, resnet50_totals
from mmubn.benchmark.rows import COLUMNS, check_csv, read_last_run
from mmubn.benchmark.subjects import MODELS, NORMS
from mmubn.cli.argument_types import count
from mmubn.cli.errors import command
from mmubn.writing import check_file

CSV = Path(__file__).resolve().parent / 'benchmarks' / 'benchmark_norm.csv'


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """The command line, defaults of the device filled in."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    subject = parser.add_mutually_exclusive_group()
    subject.add_argument('--model', choices=MODELS, help='whole training steps of this model')
    subject.add_argument(
        '--similarity', action='store_true', help='the similarity alone, for 8 to 1024 images'
    )
    subject.add_argument(
        '--plot-only', action='store_true', help='measure nothing, plot the last run of --csv'
    )
    parser.add_argument('--norms', nargs='+', choices=NORMS, metavar='NORM', help=', '.join(NORMS))
    parser.add_argument(
        '--shapes',
        nargs='+',
        type=parse_shape,
        metavar='N,C,H,W',
        help='of layers, or the model input',
    )
    parser.add_argument(
        '--dtypes',
        nargs='+',
        choices=['float32', 'bfloat16', 'float16'],
        help='of the input; of autocast with --model',
    )
    parser.add_argument('--layouts', nargs='+', choices=LAYOUTS)
    parser.add_argument(
        '--device', type=torch.device, default='cuda' if torch.cuda.is_available() else 'cpu'
    )
    parser.add_argument('--threads', type=count, help="CPU threads (torch's default)")
    parser.add_argument('--repeats', type=count, default=20, help='measured rounds (%(default)s)')
    parser.add_argument(
        '--csv',
        type=Path,
        default=CSV,
        help='rows are appended to it (tools/benchmarks/benchmark_norm.csv)',
    )
    parser.add_argument('--plot', type=Path, metavar='FILE.png', help='draw the ratios to bn')
    args = parser.parse_args(argv)
    if args.plot_only and args.plot is None:
        parser.error('--plot-only needs --plot FILE.png')
    if args.device.type == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda: torch sees no CUDA device')
    fill_in(args)
    return args


@command
def main(argv: Optional[Sequence[str]] = None) -> None:
    """Reads the command line, measures and reports."""
    args = parse_args(argv)
    if args.plot is not None:
        check_picture('--plot', args.plot)
    if args.plot_only:
        plot(read_last_run(args.csv), args.plot)
        return
    check_file('--csv', args.csv)
    check_csv(args.csv, COLUMNS)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.device.type == 'cuda':
        torch.cuda.set_device(args.device.index or 0)
        torch.backends.cudnn.benchmark = True  # the fastest convolutions leave norms the most share
    bench = Bench(args)
    print(', '.join(f'{key} {value}' for key, value in bench.run.items() if value), flush=True)
    rows, status = run_all(bench, args.csv)
    print('\n' + '\n'.join(resnet50_totals(rows) + goals(rows)))
    if args.plot is not None:
        plot(rows, args.plot)
    if status:
        sys.exit(status)


if __name__ == '__main__':
    main()

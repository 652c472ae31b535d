"""Times ResNet-50 in evaluation with each norm, prepared for inference and not, in each runtime.

    python tools/benchmark_inference.py --threads 2 --docs docs/deployment.md
    python tools/benchmark_inference.py --runtimes torch onnxruntime --batches 1

The norms of a runtime run in turn, round after round; times are medians, ratios to folded
BatchNorm are medians of the ratios within a round. Every output is compared before with that of
the model that is not prepared, in eager torch. Rows go to a CSV as each runtime ends, tables and
goals to stdout, progress to stderr; --docs writes the tables into a page, between its two marks.

The norms: bn is nn.BatchNorm2d and bn_folded the same after mmubn.prepare_for_inference; ubn is
UBN with random parameters, as after training, and ubn_prepared the same prepared; ubn_converted
is UBN as converted from BatchNorm and not trained, prepared; rbn_prepared, bnet_prepared and
iebn_prepared are the layers of those names, prepared. Of bnet_prepared a depthwise convolution
a layer is left and nothing else: it shows what those alone cost.
"""

import argparse
import warnings
from pathlib import Path
from typing import List, Optional, Sequence

import torch
import torchvision

from mmubn.benchmark.inference import (
    COLUMNS,
    NORMS,
    Bench,
    check_docs,
    goals,
    missing,
    table,
    write_docs,
)
from mmubn.benchmark.rows import Row, append_csv, check_csv
from mmubn.cli.argument_types import count
from mmubn.cli.errors import command
from mmubn.inference.runtimes import RUNTIMES
from mmubn.writing import check_file

CSV = Path(__file__).resolve().parent / 'benchmarks' / 'benchmark_inference.csv'


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--model', default='resnet50', help='of torchvision (%(default)s)')
    parser.add_argument('--norms', nargs='+', choices=NORMS, default=NORMS, metavar='NORM')
    parser.add_argument(
        '--runtimes',
        nargs='+',
        choices=RUNTIMES,
        default=[name for name in RUNTIMES if not missing(name)],
        metavar='RUNTIME',
        help=f'{", ".join(map(repr, RUNTIMES))}; by default those that are installed',
    )
    parser.add_argument('--batches', nargs='+', type=count, default=[1, 8], metavar='N')
    parser.add_argument('--size', type=int, default=224, help='side of the images (%(default)s)')
    parser.add_argument('--threads', type=count, help="CPU threads (torch's default)")
    parser.add_argument('--repeats', type=count, default=15, help='measured rounds (%(default)s)')
    parser.add_argument('--csv', type=Path, default=CSV)
    parser.add_argument('--docs', type=Path, help='page to write the tables into')
    args = parser.parse_args(argv)
    if args.size < 32:
        parser.error('--size begins at 32')
    if args.model not in torchvision.models.list_models(torchvision.models):
        parser.error(f'--model: torchvision has no classifier {args.model}')
    for runtime in args.runtimes:
        if missing(runtime):
            parser.error(f'{runtime} needs {", ".join(missing(runtime))}: pip install them')
    return args


@command
def main(argv: Optional[Sequence[str]] = None) -> None:
    """Reads the command line, measures and reports."""
    args = parse_args(argv)
    check_file('--csv', args.csv)
    check_csv(args.csv, COLUMNS)
    if args.docs is not None:
        check_docs(args.docs)
    warnings.filterwarnings('ignore')  # of exporters and compilers
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    rows: List[Row] = []
    for new in Bench(args).rows():
        append_csv(args.csv, new, COLUMNS)
        print(table(new), flush=True)
        rows += new
    print('\n' + '\n'.join(goals(rows)))
    if args.docs is not None:
        write_docs(args.docs, rows)


if __name__ == '__main__':
    main()

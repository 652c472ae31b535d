"""What fct_interval and fct_stride do to UBN's running similarity, on a real training.

Trains a config as it is for some iterations and takes, at every UBN layer and in every
step, the similarity of all positions and of every few rows and columns. From these it
follows the running similarity that each setting would have had, beside that of measuring
everything in every step. It keeps no checkpoint.
"""

import argparse
from pathlib import Path
from typing import Optional, Sequence

from mmubn.cli.argument_types import count
from mmubn.cli.errors import CommandError, command, user_error
from mmubn.cli.options import build_runner, load_config, make_parser
from mmubn.cli.preflight import preflight
from mmubn.cli.work_dir_lock import locked
from mmubn.similarity_options import COLUMNS, compare, record
from mmubn.writing import check_file, write_csv


def parse_args(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    parser.add_argument('--iterations', type=count, default=300, help='steps (default: 300)')
    parser.add_argument(
        '--intervals', type=count, nargs='+', default=[1, 4, 16], help='fct_interval'
    )
    parser.add_argument('--strides', type=count, nargs='+', default=[1, 2, 4], help='fct_stride')
    parser.add_argument('--csv', type=Path, help='file for the table')
    return parser.parse_args(argv)


@command
def main(argv: Optional[Sequence[str]] = None) -> None:
    """Trains and prints the table."""
    args = parse_args(argv)
    if args.csv:
        check_file('--csv', args.csv)
    if args.launcher != 'none':
        raise CommandError('--launcher: this tool measures in one process')
    cfg = load_config(args)
    if args.work_dir is None:
        cfg.work_dir = f'{Path(cfg.work_dir)}_similarity'  # not where the config trains
    cfg.train_cfg = dict(by_epoch=False, max_iters=args.iterations)
    cfg.log_processor = dict(by_epoch=False)
    cfg.param_scheduler = None
    for key in ('val_cfg', 'val_dataloader', 'val_evaluator'):
        cfg[key] = None
    # Checkpoints of these few steps are no training to resume.
    cfg.default_hooks = {**(cfg.get('default_hooks') or {}), 'checkpoint': None}
    if not args.skip_checks:
        preflight(cfg, 'train')
    runner = build_runner(cfg)
    strides = sorted({1, *args.strides})
    with user_error(ValueError):
        layers, seen = record(runner.model, strides)
    with locked(cfg.work_dir):
        runner.train()
    rows = compare(layers, seen, args.intervals, args.strides)
    print(f'\n{len(layers)} UBN layers, {args.iterations} steps of {args.config}')
    print(f'{"interval":>8} {"stride":>6} {"mean |dtau|":>11} {"largest":>8} {"gate differs":>12}')
    for interval, stride, mean, largest, gate in rows:
        print(f'{interval:>8} {stride:>6} {mean:>11.4f} {largest:>8.4f} {gate:>12.2%}')
    if args.csv:
        write_csv(args.csv, COLUMNS, rows)


if __name__ == '__main__':
    main()

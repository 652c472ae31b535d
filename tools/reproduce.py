"""Trains the rows of the paper's tables and figures, and sets them beside the paper's values.

    python tools/reproduce.py list
    python tools/reproduce.py run table3 --rows BN UBN --budget 0.1 --seeds 3 --data-root DIR
    python tools/reproduce.py report table3

Without the paper's GPUs: ``--small`` trains the same norms in a network for a CPU, that of
configs/cifar10/resnet18_small_cifar10.py; ``--config`` names another. Give ``list`` and
``report`` the same option. Studies, such as batches-of-two, are run one at a time: they make their
data, pretrain and tune before they train; see docs/evidence.md.
"""

import argparse
from pathlib import Path
from typing import Optional, Sequence

import mmubn  # noqa: F401  configs may have mmubn:: in their _base_
from mmubn.cli.argument_types import count, positive
from mmubn.cli.errors import command
from mmubn.cli.options import read_config
from mmubn.paths import ROOT
from mmubn.reproduce.commands import list_rows, report, run_rows
from mmubn.reproduce.experiments import EXPERIMENTS

SMALL = ROOT / 'configs' / 'cifar10' / 'resnet18_small_cifar10.py'


def parse_args(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest='command', required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        'experiments', nargs='*', metavar='EXPERIMENT', help=f'{", ".join(EXPERIMENTS)} (all)'
    )
    shared.add_argument(
        '--rows',
        nargs='+',
        default=[],
        metavar='PATTERN',
        help='norms or whole labels, as `list` shows them, or shell patterns of these',
    )
    network = shared.add_mutually_exclusive_group()
    network.add_argument(
        '--config', type=Path, help="train this network, with each row's norm, in place of its own"
    )
    network.add_argument(
        '--small', dest='config', action='store_const', const=SMALL, help=f'--config {SMALL.stem}'
    )
    shared.add_argument(
        '--work-dir',
        type=Path,
        metavar='ROOT',
        help='folder of all work dirs (work_dirs/reproduce/<paper, study or config name>)',
    )
    commands.add_parser('list', parents=[shared], help='rows, their configs, values and states')
    outputs = argparse.ArgumentParser(add_help=False)
    outputs.add_argument('--out', type=Path, help='folder of the report (<work dir>/report)')
    run = commands.add_parser(
        'run', parents=[shared, outputs], help='train rows and report; resumes, skips finished'
    )
    length = run.add_mutually_exclusive_group()
    length.add_argument('--budget', type=positive, help="length, as a fraction of the config's")
    length.add_argument('--epochs', type=count, help='length, in epochs')
    run.add_argument('--seeds', type=count, help="seeds of each row (3, or a study's own)")
    run.add_argument('--jobs', type=count, default=1, help='trainings at a time (%(default)s)')
    run.add_argument(
        '--gpus', type=count, default=0, help='GPUs of each training, by dist_train.sh'
    )
    run.add_argument(
        '--no-condensation',
        action='store_true',
        help='train without CondensationHook: a little faster, no condensation curves',
    )
    as_there = dict(help='as of train.py, for every run')
    run.add_argument('--data-root', **as_there)
    run.add_argument('--cfg-options', nargs='+', action='extend', default=[], **as_there)
    for name in ('--amp', '--auto-scale-lr', '--eval-on-train'):
        run.add_argument(name, action='store_true', **as_there)
    commands.add_parser(
        'report', parents=[shared, outputs], help='tables and pictures of the finished runs'
    )
    return parser.parse_args(argv)


@command
def main(argv: Optional[Sequence[str]] = None) -> None:
    """Does what the command line says."""
    args = parse_args(argv)
    if args.config is not None:
        read_config(args.config)  # before any work
    {'list': list_rows, 'run': run_rows, 'report': report}[args.command](args)


if __name__ == '__main__':
    main()

"""Trains the rows of the paper's tables and figures, and sets them beside the paper's values.

    python tools/reproduce.py list
    python tools/reproduce.py run table3 --rows BN UBN --budget 0.1 --seeds 3 --data-root DIR
    python tools/reproduce.py report table3

Without the paper's GPUs: ``--small`` trains the same norms in a network for a CPU, that of
configs/cifar10/resnet18_small_cifar10.py; ``--config`` names another. Give ``list`` and
``report`` the same option. Studies (batches-of-two, strong-recipe) are run one at a time: they
make their data, pretrain and tune before they train; see docs/evidence.md.
"""

import argparse
import signal
import sys
from pathlib import Path
from typing import Dict, List, Optional, Sequence

import reproduce_plot
from reproduce_logs import read_run
from reproduce_report import Line, write_tables
from reproduce_rows import ROWS, TITLES, Row, select
from reproduce_run import (
    ROOT,
    Setting,
    as_arguments,
    load_config,
    make_jobs,
    make_setting,
    run_jobs,
    work_dirs,
)
from reproduce_studies import STUDIES, Options, Study, run_study, write_tuning

from mmubn.cli.errors import CommandError, command

SMALL = ROOT / 'configs' / 'cifar10' / 'resnet18_small_cifar10.py'


def parse_args(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest='command', required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        'experiments', nargs='*', metavar='EXPERIMENT', help=f'{", ".join(TITLES)} (all)'
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
    length.add_argument('--budget', type=_positive, help="length of a training by the config's")
    length.add_argument('--epochs', type=_count, help='length of a training')
    run.add_argument('--seeds', type=_count, help="seeds of each row (3, or a study's own)")
    run.add_argument('--jobs', type=_count, default=1, help='trainings at a time (%(default)s)')
    run.add_argument('--gpus', type=_count, default=0, help='processes of each, by dist_train.sh')
    run.add_argument(
        '--no-condensation',
        action='store_true',
        help='train without CondensationHook: a little faster, no condensation curves',
    )
    for name in ('--data-root', '--cfg-options'):
        nargs = '+' if name == '--cfg-options' else None
        run.add_argument(name, nargs=nargs, help='as of train.py, for every run')
    for name in ('--amp', '--auto-scale-lr', '--eval-on-train'):
        run.add_argument(name, action='store_true', help='as of train.py, for every run')
    commands.add_parser(
        'report', parents=[shared, outputs], help='tables and pictures of the finished runs'
    )
    return parser.parse_args(argv)


def work_root(args: argparse.Namespace, experiment: str) -> Path:
    """The folder of an experiment's work dirs."""
    if args.work_dir is not None:
        return args.work_dir
    name = args.config.stem if args.config else experiment if experiment in STUDIES else 'paper'
    return Path('work_dirs') / 'reproduce' / name


def study_of(args: argparse.Namespace) -> Optional[Study]:
    """The study that is asked for, if it is one."""
    named = [name for name in args.experiments if name in STUDIES]
    if named and len(args.experiments) > 1:
        raise CommandError(f'{named[0]} is a study: give it a command of its own')
    if named and args.config:
        raise CommandError(f'{named[0]} is a study: it has its own network, without --config')
    return STUDIES[named[0]] if named else None


def _positive(text: str) -> float:
    value = float(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f'must be positive, got {text}')
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'must be at least 1, got {text}')
    return value


def find_lines(args: argparse.Namespace) -> Dict[str, List[Line]]:
    """The chosen rows with what the work dirs have of them, by experiment."""
    found: Dict[str, List[Line]] = {}
    for row in _rows(args):
        setting = make_setting(row, args.config)
        root = work_root(args, row.experiment)
        runs = {int(d.name[4:]): read_run(d) for d in work_dirs(root, setting)}
        found.setdefault(row.experiment, []).append(Line(row, setting, runs))
    return found


def _rows(args: argparse.Namespace) -> List[Row]:
    return select(args.experiments, args.rows, one_network=args.config is not None)


def list_rows(args: argparse.Namespace) -> None:
    """Prints the rows."""
    for experiment, lines in find_lines(args).items():
        print(f'\n{experiment}  {TITLES[experiment]}')
        for line in lines:
            options = ' '.join(as_arguments(line.setting.options))
            print(f'  {line.row.label}  [{line.state}]  {_values(line.row)}'.rstrip())
            print(f'    {_shown(line.setting.config)} {options}'.rstrip())


def _values(row: Row) -> str:
    """What the paper and the host's model zoo have of a row."""
    shown = {'paper': row.paper, "host's own BN": row.zoo.values if row.zoo else {}}
    texts = {
        source: ', '.join(f'{key} {value:g}' for key, value in values.items())
        for source, values in shown.items()
    }
    if TITLES[row.experiment].startswith('Figure'):
        texts['paper'] = 'a curve'
    return '  '.join(f'{source}: {text}' for source, text in texts.items() if text)


def _shown(config: Path) -> str:
    return str(config.relative_to(ROOT)) if config.is_relative_to(ROOT) else str(config)


def run_rows(args: argparse.Namespace) -> None:
    """Trains the rows, and reports what is finished."""
    if not args.experiments:
        raise CommandError('run: name the experiments, such as table3')
    rows = _rows(args)
    if args.config is not None:
        detects = load_config(args.config).get('default_scope') == 'mmdet'
        for row in rows:
            if detects != row.detects:
                kinds = ('detection', 'classification')
                one, other = kinds if detects else reversed(kinds)
                raise CommandError(f'{args.config} is for {one}, {row.experiment} is {other}')
    flags = [
        f'--{flag.replace("_", "-")}'
        for flag in ('amp', 'auto_scale_lr', 'eval_on_train')
        if getattr(args, flag)
    ]
    # Ended by a signal, it ends its trainings too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    study = study_of(args)
    if study is not None:
        if args.epochs:
            raise CommandError('--epochs: a study has several trainings, scale them by --budget')
        options = Options(
            root=work_root(args, rows[0].experiment),
            data_root=args.data_root,
            seeds=args.seeds or study.seeds,
            budget=args.budget or 1,
            options=args.cfg_options or [],
            flags=flags,
            condensation=not args.no_condensation,
            parallel=args.jobs,
            gpus=args.gpus,
        )
        every_row = [row for row in ROWS if row.experiment == rows[0].experiment]
        jobs, failed = run_study(study, rows, every_row, options)
    else:
        jobs, failed = _run_plain(rows, args, flags)
    if len(failed) < len(jobs):
        report(args)
    if failed:
        print(f'{len(failed)} of {len(jobs)} runs failed:', *failed, sep='\n  ', file=sys.stderr)
        sys.exit(1)


def _run_plain(rows: List[Row], args: argparse.Namespace, flags: List[str]) -> tuple:
    """Trains rows as their configs say; the jobs, and what failed."""
    settings: Dict[str, Setting] = {}
    for row in rows:
        setting = make_setting(row, args.config)
        settings[setting.name] = setting
    jobs = make_jobs(
        list(settings.values()),
        work_root(args, rows[0].experiment),
        args.seeds or 3,
        args.budget,
        args.epochs,
        args.cfg_options or [],
        flags,
        args.data_root,
        args.gpus,
        condensation=not args.no_condensation,
    )
    return jobs, run_jobs(jobs, args.jobs)


def report(args: argparse.Namespace) -> None:
    """Writes tables and pictures of the finished runs."""
    study = study_of(args)
    lines = find_lines(args)
    root = work_root(args, next(iter(lines)))
    if not any(line.done for found in lines.values() for line in found):
        raise CommandError(f'{root}: no finished run of these rows; `run` trains them')
    out = args.out or root / 'report'
    written = write_tables(lines, out, args.config is not None)
    if study is not None:
        rows = [line.row for found in lines.values() for line in found]
        with (out / 'report.md').open('a') as file:
            file.write('\n'.join(write_tuning(study, rows, root, out)) + '\n')
        written.append(out / 'tuning.csv')
    for path in [*written, *reproduce_plot.draw(lines, out, args.config is not None)]:
        print(path)


@command
def main(argv: Optional[Sequence[str]] = None) -> None:
    """Does what the command line says."""
    args = parse_args(argv)
    {'list': list_rows, 'run': run_rows, 'report': report}[args.command](args)


if __name__ == '__main__':
    main()

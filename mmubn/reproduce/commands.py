"""What ``tools/reproduce.py`` does: lists, trains, reports."""

import argparse
import signal
import sys
from pathlib import Path
from typing import Dict, List, Optional

from mmengine.config import Config
from torch import nn

from ..cli.cfg_options import split_option
from ..cli.errors import CommandError
from ..cli.optimizer_check import check_optimizer
from ..cli.options import load_config, make_parser
from ..cli.value_check import check_values
from ..paths import ROOT
from ..writing import check_folder
from .experiments import EXPERIMENTS, select
from .logs import read_run
from .plot import draw
from .report import Line, write_tables
from .rows import Row
from .run import (
    Options,
    as_arguments,
    make_jobs,
    make_setting,
    run_jobs,
    work_dirs,
)
from .run_study import run_study, write_tuning
from .study import LEARNING_RATE, Study


def work_root(args: argparse.Namespace, experiment: str) -> Path:
    """The folder of an experiment's work dirs."""
    if args.work_dir is not None:
        return args.work_dir
    name = args.config.stem if args.config else experiment if _is_study(experiment) else 'paper'
    return Path('work_dirs') / 'reproduce' / name


def study_of(args: argparse.Namespace) -> Optional[Study]:
    """The study that is asked for, if it is one."""
    named = [name for name in args.experiments if _is_study(name)]
    if named and len(args.experiments) > 1:
        raise CommandError(f'{named[0]} is a study: give it a command of its own')
    if named and args.config:
        raise CommandError(f'{named[0]} is a study: it has its own network, without --config')
    return EXPERIMENTS[named[0]].study if named else None


def _is_study(name: str) -> bool:
    return name in EXPERIMENTS and EXPERIMENTS[name].study is not None


def find_lines(args: argparse.Namespace) -> Dict[str, List[Line]]:
    """The chosen rows with what the work dirs have of them, by experiment."""
    found: Dict[str, List[Line]] = {}
    for row in _rows(args):
        setting = make_setting(row, args.config)
        root = work_root(args, row.experiment)
        runs = {seed: read_run(folder) for seed, folder in work_dirs(root, setting).items()}
        found.setdefault(row.experiment, []).append(Line(row, setting, runs))
    return found


def _rows(args: argparse.Namespace) -> List[Row]:
    return select(args.experiments, args.rows, one_network=args.config is not None)


def list_rows(args: argparse.Namespace) -> None:
    """Prints the rows."""
    for experiment, lines in find_lines(args).items():
        print(f'\n{experiment}  {EXPERIMENTS[experiment].title}')
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
    if EXPERIMENTS[row.experiment].is_figure:
        texts['paper'] = 'a curve'
    return '  '.join(f'{source}: {text}' for source, text in texts.items() if text)


def _shown(config: Path) -> str:
    return str(config.relative_to(ROOT)) if config.is_relative_to(ROOT) else str(config)


def run_rows(args: argparse.Namespace) -> None:
    """Trains the rows, and reports what is finished."""
    if not args.experiments:
        raise CommandError('run: name the experiments, such as table3')
    rows = _rows(args)
    root = work_root(args, rows[0].experiment)
    check_folder('--work-dir', root)
    _report_folder(args, root)
    if args.config is not None:
        detects = _sound_config(args.config).get('default_scope') == 'mmdet'
        for row in rows:
            if detects != row.detects:
                kinds = ('detection', 'classification')
                one, other = kinds if detects else reversed(kinds)
                raise CommandError(f'{args.config} is for {one}, {row.experiment} is {other}')
    _check_learning_rates(args, rows)
    study = study_of(args)
    told = _told(args, study)
    # Ended by a signal, it ends its trainings too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if study is not None:
        every_row = EXPERIMENTS[rows[0].experiment].rows
        jobs, failed = run_study(study, rows, every_row, root, told, args.jobs)
    else:
        settings = (make_setting(row, args.config) for row in rows)
        jobs = make_jobs(list({s.name: s for s in settings}.values()), root, told)
        failed = run_jobs(jobs, args.jobs)
    if failed:
        print(f'{len(failed)} of {len(jobs)} runs failed:', *failed, sep='\n  ', file=sys.stderr)
    lines = find_lines(args)
    if _finished(lines):
        _write_report(args, lines)
    if failed:
        sys.exit(1)


def _sound_config(file: Path) -> Config:
    """The config of a file, looked at as train.py does; the schedule is read from it."""
    cfg = load_config(make_parser('').parse_args([str(file)]), 'train')
    for check in (check_values, check_optimizer):
        check(cfg, nn.Module())
    return cfg


def _check_learning_rates(args: argparse.Namespace, rows: List[Row]) -> None:
    """Refuses what changes, or does not fit, a learning rate that a row or a study sets.

    Raises:
        CommandError: It would be scaled once more, a step would take more images than it is for,
            or it is for another network.
    """
    own = [row for row in rows if LEARNING_RATE in row.options]
    study = study_of(args)
    if not own and (study is None or LEARNING_RATE not in study.grid):
        return
    sets = f'{(own or rows)[0].experiment} sets the learning rate itself'
    scaled = ['--auto-scale-lr'] if args.auto_scale_lr else []
    for option in args.cfg_options:
        key, value = split_option(option)
        if key == 'auto_scale_lr.enable' and value.strip().lower() != 'false':
            scaled.append('--cfg-options auto_scale_lr.enable')
    if scaled:
        raise CommandError(f'{scaled[0]}: {sets}, which would be scaled once more; leave it out')
    if own and args.gpus > 1:
        raise CommandError(
            f'--gpus {args.gpus}: {sets}, for the images of one process; leave it out, or give '
            '--gpus 1'
        )
    for row in own:
        if args.config and args.config.resolve() != (ROOT / 'configs' / row.network).resolve():
            raise CommandError(f'--config: {sets}, for {Path(row.network).name}; leave it out')


def _told(args: argparse.Namespace, study: Optional[Study]) -> Options:
    """What the command line says of the trainings.

    Raises:
        CommandError: A study cannot have it.
    """
    if study is not None and args.epochs:
        raise CommandError('--epochs: a study has several trainings, scale them by --budget')
    if study is not None and args.eval_on_train:
        raise CommandError(
            '--eval-on-train: a study tunes on its validation split and compares on its test '
            'split; leave it out'
        )
    flags = [
        f'--{flag.replace("_", "-")}'
        for flag in ('amp', 'auto_scale_lr', 'eval_on_train')
        if getattr(args, flag)
    ]
    return Options(
        seeds=args.seeds or (3 if study is None else study.seeds),
        budget=args.budget or 1,
        epochs=args.epochs,
        user_options=args.cfg_options,
        flags=flags,
        data_root=args.data_root,
        gpus=args.gpus,
        condensation=not args.no_condensation,
    )


def report(args: argparse.Namespace) -> None:
    """Writes tables and pictures of the finished runs."""
    lines = find_lines(args)
    if not _finished(lines):
        root = work_root(args, next(iter(lines)))
        raise CommandError(f'{root}: no finished run of these rows; `run` trains them')
    _write_report(args, lines)


def _finished(lines: Dict[str, List[Line]]) -> bool:
    return any(line.done for found in lines.values() for line in found)


def _report_folder(args: argparse.Namespace, root: Path) -> Path:
    """Where the report goes, which can be written."""
    out = args.out or root / 'report'
    check_folder('--out', out)
    return out


def _write_report(args: argparse.Namespace, lines: Dict[str, List[Line]]) -> None:
    study = study_of(args)
    root = work_root(args, next(iter(lines)))
    out = _report_folder(args, root)
    written = write_tables(lines, out, args.config is not None)
    if study is not None:
        rows = [line.row for found in lines.values() for line in found]
        with (out / 'report.md').open('a', encoding='utf-8') as file:
            file.write('\n'.join(write_tuning(study, rows, root, out)) + '\n')
        written.append(out / 'tuning.csv')
    for path in [*written, *draw(lines, out, args.config is not None)]:
        print(path)

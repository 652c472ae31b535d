"""Trains the settings of rows, several seeds each, through train.py."""

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Collection, Dict, List, Optional, Sequence, Tuple

import torch
from mmengine.config import Config
from tqdm import tqdm

from ..benchmark.rows import describe_run
from ..cli.cfg_options import split_option
from ..cli.errors import CommandError, warn
from ..cli.options import read_config
from ..paths import ROOT
from ..runs import checkpoints
from ..walk import each, type_name
from ..writing import replace_text
from .logs import EPOCH_LOSS, METRICS, SETTINGS, read_run
from .rows import BATCH_NORMS, Row

SEED = 'randomness.seed'
NORM = 'model.backbone.norm_cfg'
LOG_INTERVAL = 10  # iterations
SCALED = ('begin', 'end', 'milestones', 'step_size')
LENGTHS = ('T_max', 'total_steps')  # from begin on
# The schedulers of mmengine and mmdet that have no other times.
SCHEDULERS = (
    *('Constant', 'CosineAnnealing', 'CosineRestart', 'Exponential', 'Linear', 'MultiStep'),
    *('OneCycle', 'Poly', 'QuadraticWarmup', 'Step'),
)


@dataclass(frozen=True)
class Setting:
    """What rows may share: a config with options, trained once for each seed.

    Attributes:
        name (str): Of its folder in the root of the work dirs.
        config (Path): The config file.
        norm (str): Key of ``NORM_CFGS``.
        options (dict): For ``--cfg-options``, without schedule and seed.
    """

    name: str
    config: Path
    norm: str
    options: Dict[str, Any]


def make_setting(row: Row, config: Optional[Path] = None) -> Setting:
    """The setting of a row: its own config, or a network's with the row's norm.

    Args:
        row (Row): The row.
        config (Path, optional): Another network's. Default: what the row says.
    """
    if config is None and row.network:
        config = ROOT / 'configs' / row.network
    changes = {**row.changes, **row.extra}
    parts = [f'{key.split(".")[-1]}={value}' for key, value in changes.items()]
    if config is None:
        options = {f'{NORM}.{key}': value for key, value in row.changes.items()}
        path = ROOT / 'configs' / row.config
        name = path.stem
    else:
        norm_cfg = {'_delete_': True, **row.norm_cfg}
        if row.base == 'GN':
            norm_cfg['num_groups'] = _groups(config)
        options = {f'{NORM}.{key}': value for key, value in norm_cfg.items()}
        path = config
        name = f'{config.stem}-{row.base}'
    return Setting('-'.join([name, *parts]), path, row.base, {**options, **row.extra})


def _groups(config: Path) -> int:
    """32, or half of the channels of a stem that is too narrow for these."""
    channels = read_config(config).model.backbone.get('stem_channels', 64)
    return max(1, min(32, channels // 2))


def as_arguments(options: Dict[str, Any]) -> List[str]:
    """Options as ``--cfg-options`` takes them."""
    return [f'{key}={value}'.replace(' ', '') for key, value in options.items()]


def scaled_schedule(cfg: Config, epochs: int) -> Dict[str, Any]:
    """The options that shorten a config's schedule.

    Each scheduler's times are multiplied by the ratio of the lengths and rounded to whole
    epochs (iterations, where it counts these), at least one unless zero. A length that counts
    from ``begin`` on, such as ``T_max``, is scaled by its last time, so that it still ends
    where ``end`` does.

    Args:
        cfg (Config): With an epoch-based training.
        epochs (int): The new length.

    Raises:
        CommandError: The length changes, and a scheduler is of a type whose times are not
            known.
    """
    ratio = epochs / cfg.train_cfg.max_epochs

    def scaled(value):
        if isinstance(value, (list, tuple)):
            return [scaled(item) for item in value]
        return max(1, round(value * ratio)) if value else value

    options: Dict[str, Any] = {'train_cfg.max_epochs': epochs}
    for name, scheduler in each(cfg.get('param_scheduler'), 'param_scheduler'):
        kind = type_name(scheduler)
        if ratio != 1 and re.sub('(LR|Momentum|ParamScheduler)$', '', kind) not in SCHEDULERS:
            raise CommandError(
                f'{name}.type: how to shorten {scheduler.get("type")} is not known; train the '
                f'whole length, {cfg.train_cfg.max_epochs} epochs, or give a config without it by '
                '--config'
            )
        for key in SCALED:
            if scheduler.get(key) is not None:
                options[f'{name}.{key}'] = scaled(scheduler[key])
        begin = scheduler.get('begin') or 0
        for key in LENGTHS:
            if scheduler.get(key) is not None:
                length = scaled(begin + scheduler[key]) - scaled(begin)
                options[f'{name}.{key}'] = max(1, length)
        if scheduler.get('periods') is not None:
            ends = [scaled(begin + end) for end in accumulate(scheduler['periods'])]
            starts = [scaled(begin), *ends]
            options[f'{name}.periods'] = [max(1, b - a) for a, b in zip(starts, ends)]
    return options


def refuse_varied(
    user_options: Sequence[str],
    setting: Setting,
    schedule: Collection[str],
    tuned: Collection[str] = (),
) -> None:
    """Refuses what would lie over the settings in which the trainings differ.

    Args:
        user_options (Sequence[str]): ``KEY=VALUE``.
        setting (Setting): What is trained.
        schedule (Collection[str]): Keys of :func:`scaled_schedule`.
        tuned (Collection[str]): Keys that a study chooses.

    Raises:
        CommandError: It is not ``KEY=VALUE``, or its key is one of those, is part of one, or has
            one in it.
    """
    varied = (SEED, f'{NORM}.type', *schedule, *tuned, *setting.options)
    for option in user_options:
        key, _ = split_option(option)
        for own in varied:
            if f'{own}.'.startswith(f'{key}.') or f'{key}.'.startswith(f'{own}.'):
                raise CommandError(
                    f'--cfg-options {key}: {own} is set for each run by reproduce.py; leave it '
                    'out (--seeds, --budget, --epochs and --rows choose what is trained)'
                )


@dataclass(frozen=True)
class Options:
    """What ``reproduce.py run`` was told of the trainings.

    Attributes:
        seeds (int): How many, from 0.
        budget (float): Length by that of the config.
        epochs (int, optional): Length, in place of that.
        user_options (Sequence[str]): ``KEY=VALUE`` for all trainings. :func:`refuse_varied`
            keeps out the keys in which the trainings differ.
        flags (Sequence[str]): Others of train.py, such as ``--amp``.
        data_root (str, optional): Folder of the data.
        gpus (int): Processes of each, through dist_train.sh; 0 for train.py.
        condensation (bool): Whether to record it, where there is a batch norm.
    """

    seeds: int
    budget: float
    epochs: Optional[int]
    user_options: Sequence[str]
    flags: Sequence[str]
    data_root: Optional[str]
    gpus: int
    condensation: bool


@dataclass
class Job:
    """One training to come: a setting with a seed in a folder."""

    setting: Setting
    folder: Path
    arguments: List[str]
    settings: Dict[str, Any]  # what run.json says

    @property
    def title(self) -> str:
        """Setting and seed, for messages."""
        return f'{self.folder.parent.name}/{self.folder.name}'


def make_jobs(
    settings: Sequence[Setting], root: Path, told: Options, chosen: Sequence[str] = ()
) -> List[Job]:
    """The jobs of all settings, seed by seed, so that a broken-off series has whole pairs.

    Args:
        settings (Sequence[Setting]): What to train.
        root (Path): Holds ``<setting>/seed<number>``.
        told (Options): How.
        chosen (Sequence[str]): ``KEY=VALUE`` that a study's tuning chose.

    Raises:
        CommandError: ``data_root`` is no folder; a config cannot be read, trains by
            iterations, or cannot be shortened; an option of the user is refused; a work dir
            holds a run with other settings or on other data.
    """
    data = Path(told.data_root) if told.data_root else None
    if data and not data.is_dir():
        raise CommandError(f'--data-root: {data} is not a folder')
    plans = [(setting, *_plan(setting, told, chosen)) for setting in settings]
    common = [*told.user_options, *chosen]
    shared = dict(
        flags=list(told.flags),
        data=data.resolve().name if data else None,
        data_root=str(data.resolve()) if data else None,
        gpus=told.gpus,
    )
    jobs = []
    for seed in range(told.seeds):
        for setting, epochs, options, digest in plans:
            folder = root / setting.name / f'seed{seed}'
            listed = [*as_arguments({**options, SEED: seed}), *common]
            # The reports take names from it, so that they tell no path of a machine.
            record = dict(
                config=setting.config.stem,
                config_digest=digest,
                options=[*as_arguments(setting.options), *common],
                epochs=epochs,
                seed=seed,
                **shared,
            )
            _check_same(folder, record)
            arguments = [str(setting.config), '--work-dir', str(folder), '--resume', *told.flags]
            if data:
                arguments += ['--data-root', str(data)]
            arguments += ['--cfg-options', *listed]
            jobs.append(Job(setting, folder, arguments, record))
    return jobs


def _plan(
    setting: Setting, told: Options, chosen: Sequence[str]
) -> Tuple[int, Dict[str, Any], str]:
    """What all seeds of a setting share: epochs, options, and the digest of the config."""
    cfg = read_config(setting.config)
    total = cfg.train_cfg.get('max_epochs')
    if total is None:
        raise CommandError(f'{setting.config}: trains by iterations, no epochs to scale')
    _check_evaluator(cfg, setting.config)
    epochs = told.epochs or max(1, round(told.budget * total))
    schedule = scaled_schedule(cfg, epochs)
    refuse_varied(told.user_options, setting, schedule, [split_option(o)[0] for o in chosen])
    options = {**setting.options, **schedule, **_log_options(cfg)}
    saving = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
    if saving.get('max_keep_ckpts') == 1:
        # A run that is killed before its last validation goes on from the one before.
        options['default_hooks.checkpoint.max_keep_ckpts'] = 2
    options.update(_condensation_options(cfg, setting.norm, told.condensation))
    return epochs, options, _digest(cfg)


def _check_evaluator(cfg: Config, config: Path) -> None:
    evaluator = cfg.get('val_evaluator')
    if not evaluator:
        raise CommandError(f'{config}: has no val_evaluator, so no value to compare')
    if not re.search('Accuracy|Coco', str(evaluator)):
        warn(f'{config}: val_evaluator: the report reads {", ".join(METRICS)} alone')


def _log_options(cfg: Config) -> Dict[str, Any]:
    """Whole epochs in the log, every line the mean of as many iterations as it stands for.

    The last line of an epoch stands for fewer, and its mean runs into the line before. So it
    has the loss of the whole epoch beside it.
    """
    epoch_loss = dict(data_src='loss', log_name=EPOCH_LOSS, method_name='mean', window_size='epoch')
    others = (cfg.get('log_processor') or {}).get('custom_cfg') or []
    return {
        'default_hooks.logger.interval': LOG_INTERVAL,
        'default_hooks.logger.ignore_last': False,
        'log_processor.window_size': LOG_INTERVAL,
        'log_processor.custom_cfg': [*map(dict, others), epoch_loss],
    }


def _condensation_options(cfg: Config, norm: str, wanted: bool) -> Dict[str, Any]:
    hooks = cfg.get('custom_hooks') or []
    others = [dict(hook) for hook in hooks if type_name(hook) != 'CondensationHook']
    wanted = wanted and norm in BATCH_NORMS  # the hook refuses a network without any
    if wanted and len(others) == len(hooks):
        return {'default_hooks.condensation.type': 'CondensationHook'}
    if not wanted and len(others) < len(hooks):
        return {'custom_hooks': others}
    return {}


def _digest(cfg: Config) -> str:
    """Tells one content of a config file from another."""
    text = json.dumps(cfg.to_dict(), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _check_same(folder: Path, record: Dict[str, Any]) -> None:
    run = read_run(folder)
    if not run.curves and not checkpoints(folder):
        return  # it failed before it trained, and nothing of it is kept
    old = run.settings
    for key, value in record.items():
        if key in old and old[key] != value:  # an older version wrote fewer
            hint = ''
            if key == 'data_root':
                hint = f', or, if it is the same data in another place, change {folder / SETTINGS}'
            raise CommandError(
                f'{folder}: holds a run with {key} {old[key]}, not {value}; '
                f'give another --work-dir, or remove it{hint}'
            )


def run_jobs(jobs: Sequence[Job], parallel: int) -> List[str]:
    """Trains what is not finished, ``parallel`` at a time, with a line of progress.

    Args:
        jobs (Sequence[Job]): Finished ones are skipped, begun ones resumed.
        parallel (int): Trainings at a time.

    Returns:
        list[str]: A line for each that failed.
    """
    waiting = [job for job in jobs if read_run(job.folder).state != 'done']
    print(f'{len(jobs) - len(waiting)} of {len(jobs)} runs are finished', flush=True)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    torch.set_num_threads(threads_of_each(parallel))  # what the record of the machine says
    machine = describe_run(device)
    running: Dict[int, tuple] = {}
    failed: List[str] = []
    done = {job.title: read_run(job.folder).epoch for job in jobs}
    total = sum(job.settings['epochs'] for job in jobs)
    progress = tqdm(
        total=total,
        initial=sum(done.values()),
        unit='epoch',
        mininterval=1 if sys.stderr.isatty() else 30,
    )
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                job = waiting.pop(0)
                job.folder.mkdir(parents=True, exist_ok=True)
                record = {**job.settings, **_machines(job.folder, machine)}
                replace_text(job.folder / SETTINGS, json.dumps(record, indent=1))
                process = _start(job)
                running[process.pid] = job, process
            for pid, (job, process) in list(running.items()):
                ended = process.poll() is not None
                run = read_run(job.folder)
                progress.update(run.epoch - done[job.title])
                done[job.title] = run.epoch
                if ended:
                    del running[pid]
                    if process.returncode or run.state != 'done':
                        line = f'{job.title}: {_last_line(job.folder)}'
                        failed.append(line)
                        progress.write(f'FAILED {line}', file=sys.stderr)
            names = ', '.join(job.title for job, _ in running.values())
            postfix = f'{len(waiting)} runs waiting, {len(failed)} failed; {names}'
            progress.set_postfix_str(postfix, refresh=False)
            time.sleep(0.5)
    finally:
        for _, process in running.values():  # broken off by the user
            process.terminate()
        for _, process in running.values():
            process.wait()
        progress.close()
    return failed


def _machines(folder: Path, machine: Dict[str, Any]) -> Dict[str, Any]:
    """What the record says of the machine; of a training that goes on, where it has been too."""
    before = read_run(folder).settings if checkpoints(folder) else {}
    found = dict(machine)
    for key in ('commit', 'device', 'torch'):
        parts = *before.get(key, '').split('; '), machine[key]
        found[key] = '; '.join(dict.fromkeys(filter(None, parts)))
    return found


def threads_of_each(parallel: int) -> int:
    """OpenMP threads of each of several trainings: its share, or what OMP_NUM_THREADS says."""
    threads = torch.get_num_threads()
    return threads if 'OMP_NUM_THREADS' in os.environ else max(1, threads // parallel)


def _start(job: Job) -> subprocess.Popen:
    gpus = job.settings['gpus']
    config, *others = _arguments(job)
    if gpus:
        command = [str(ROOT / 'tools' / 'dist_train.sh'), config, str(gpus), *others]
    else:
        command = [sys.executable, str(ROOT / 'tools' / 'train.py'), config, *others]
    env = {**os.environ, 'PYTHON': sys.executable}
    if not gpus:  # torchrun has a number of its own
        env.setdefault('OMP_NUM_THREADS', str(torch.get_num_threads()))
    with (job.folder / 'output.log').open('a') as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)


def _arguments(job: Job) -> List[str]:
    """Those of train.py.

    A run that lacks only its last validation goes back one checkpoint, or begins anew where
    there is none, since a resumed training validates only after an epoch.
    """
    last, *before = checkpoints(job.folder) or [None]
    if last is None or last.name != f'epoch_{job.settings["epochs"]}.pth':
        return job.arguments
    place = job.arguments.index('--resume')
    resume = ['--resume', str(before[0])] if before else []
    return [*job.arguments[:place], *resume, *job.arguments[place + 1 :]]


def _last_line(folder: Path) -> str:
    lines = (folder / 'output.log').read_text(errors='replace').split('\n')
    return next((line.strip() for line in reversed(lines) if line.strip()), 'no output')


def work_dirs(root: Path, setting: Setting) -> Dict[int, Path]:
    """The folder of each seed of a setting, in their order."""
    folders = (path for path in (root / setting.name).glob('seed*') if path.is_dir())
    found = ((re.fullmatch(r'seed(\d+)', path.name), path) for path in folders)
    return dict(sorted((int(match[1]), path) for match, path in found if match))

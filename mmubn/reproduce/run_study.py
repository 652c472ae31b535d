"""Studies: rows that need data of their own, a pretrained backbone, or settings tuned first.

A study goes through stages, each of which is skipped as far as it is finished: it makes its
data, pretrains, trains every tuned row at each point of its grid on a validation split, and
then trains the rows, several seeds each, with the settings that won there, on the test split.
What is tuned, and how the results are read, is written in docs/evidence.md.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from mmengine.registry import DefaultScope

from ..cli.data_root import set_data_root
from ..cli.errors import CommandError, user_error
from ..cli.options import read_config
from ..markdown import table
from ..writing import write_csv
from .logs import read_run
from .rows import Row, name_among
from .run import (
    Job,
    Options,
    Setting,
    as_arguments,
    make_jobs,
    make_setting,
    refuse_varied,
    run_jobs,
    scaled_schedule,
)
from .study import TRAINING_IMAGES, Study

TUNING, PRETRAINING, SCENES = 'tuning', 'pretraining', 'scenes'
COLUMNS = ('row', 'setting', 'metric', 'value', 'chosen', 'at_edge')


def run_study(
    study: Study,
    rows: Sequence[Row],
    every_row: Sequence[Row],
    root: Path,
    told: Options,
    parallel: int,
) -> Tuple[List[Job], List[str]]:
    """Goes through the stages.

    Args:
        study (Study): The study.
        rows (Sequence[Row]): What to train.
        every_row (Sequence[Row]): Of the experiment, among them the one tuned for all.
        root (Path): Of all work dirs.
        told (Options): Of the trainings of ``rows``, as far as the study does not say.
        parallel (int): Trainings at a time.

    Returns:
        tuple[list[Job], list[str]]: The jobs of all stages, and a line for each that
        failed.

    Raises:
        CommandError: Data is missing or too little, an option of the user is one that the
            study chooses, or a pretraining or a whole grid failed.
    """
    if told.data_root is None:
        raise CommandError('run: a study needs --data-root')
    given = Path(told.data_root)
    # Before hours of pretraining and tuning.
    _refuse_varied(study, rows, told.user_options)
    data = given / study.folder
    _check_split(study, rows, data)
    if study.prepare:
        data = study.prepare(given, root / SCENES)
    told = replace(told, data_root=str(data))
    once = replace(told, seeds=1, condensation=False)
    jobs: List[Job] = []
    started: Dict[str, Path] = {}
    if study.pretraining:
        kinds = dict.fromkeys(row.pretrained for row in rows if row.pretrained)
        settings = [pretraining_setting(study, kind) for kind in kinds]
        of_backbones = replace(once, data_root=str(given / study.pretraining_folder))
        jobs = make_jobs(settings, root / PRETRAINING, of_backbones)
        print(f'pretraining {len(jobs)} backbones', flush=True)
        failed = run_jobs(jobs, parallel)
        if failed:
            raise CommandError(f'the pretraining failed: {failed[0]}')
        started = {job.setting.norm: _last_checkpoint(job) for job in jobs}
    tuned = [row for row in every_row if row.norm == study.tuned_for and not row.batch_size]
    tuned = tuned or list(rows)
    print(f'tuning {len(tuned)} rows at {len(study.points)} points', flush=True)
    tuning = []
    shorter = replace(once, budget=told.budget * study.tuning_budget)
    for row in tuned:
        settings = [_at(make_setting(row), point, study.validation) for point in study.points]
        tuning += _jobs(row, settings, root / TUNING, shorter, started)
    failed = run_jobs(tuning, parallel)
    training = []
    for row in rows:
        choice = choose(study, tuned[0] if study.tuned_for else row, root)
        if choice is None:
            raise CommandError(f'{row.label}: no run of its grid ended; see {root / TUNING}')
        training += _jobs(row, [make_setting(row)], root, told, started, as_arguments(choice))
    # Whole pairs first.
    training.sort(key=lambda job: job.settings['seed'])
    print(f'training {len(rows)} rows, {told.seeds} seeds', flush=True)
    failed += run_jobs(training, parallel)
    return [*jobs, *tuning, *training], failed


def _refuse_varied(study: Study, rows: Sequence[Row], options: Sequence[str]) -> None:
    for row in rows:
        setting = make_setting(row)
        cfg = read_config(setting.config)
        schedule = scaled_schedule(cfg, cfg.train_cfg.max_epochs)
        refuse_varied(options, setting, schedule, (*study.grid, *study.validation))


def _check_split(study: Study, rows: Sequence[Row], data: Path) -> None:
    """Refuses a training split that is too small to tune on one part by another."""
    last = -study.validation.get('val_dataloader.dataset.indices', 0)
    if not last:
        return
    settings = [_at(make_setting(row), {}, study.validation) for row in rows]
    first = max(_tuned_on(setting) for setting in settings)
    images = training_images(settings[0].config, data)
    if images < first + last:
        raise CommandError(
            f'--data-root: {data} has {images} training images; the study tunes on the first '
            f'{first} and validates on the last {last}, so it needs {first + last}'
        )


def _tuned_on(setting: Setting) -> int:
    """How many training images a tuning run takes."""
    if TRAINING_IMAGES in setting.options:
        return setting.options[TRAINING_IMAGES]
    return read_config(setting.config).train_dataloader.dataset.get('indices', 0)


def training_images(config: Path, data: Path) -> int:
    """How many images the training split of a classification has, without its ``indices``.

    Raises:
        CommandError: The data cannot be read.
    """
    # Here, so that `list` starts quickly and detection alone needs no mmpretrain.
    from mmpretrain.registry import DATASETS

    cfg = read_config(config)
    set_data_root(cfg, str(data))
    dataset = dict(cfg.train_dataloader.dataset, pipeline=[], lazy_init=True)
    # The datasets raise anything for data that is not there.
    fault = user_error(Exception, of=f'--data-root: {data}')
    with fault, DefaultScope.overwrite_default_scope('mmpretrain'):
        return len(DATASETS.build(dataset).load_data_list())


def _jobs(
    row: Row,
    settings: Sequence[Setting],
    root: Path,
    told: Options,
    started: Dict[str, Path],
    chosen: Sequence[str] = (),
) -> List[Job]:
    """Those of a row, which start from its backbone."""
    jobs = make_jobs(settings, root, told, chosen)
    if row.pretrained:
        checkpoint = repr(str(started[row.pretrained]))  # a comma would make a list of it
        init_cfg = dict(type='Pretrained', checkpoint=checkpoint, prefix='backbone.')
        # Not among the settings of the record, where no path belongs.
        for job in jobs:
            job.arguments += [f'model.backbone.init_cfg.{k}={v}' for k, v in init_cfg.items()]
    return jobs


def _last_checkpoint(job: Job) -> Path:
    return job.folder.resolve() / f'epoch_{job.settings["epochs"]}.pth'


def pretraining_setting(study: Study, kind: str) -> Setting:
    """The setting of a pretraining with a norm."""
    return make_setting(Row('CIFAR-100', '', kind, kind, network=study.pretraining))


def _at(setting: Setting, point: Dict[str, float], options: Dict[str, Any]) -> Setting:
    """A setting at a point of the grid."""
    name = '-'.join([setting.name, *(f'{key.split(".")[-1]}={v:g}' for key, v in point.items())])
    return Setting(name, setting.config, setting.norm, {**setting.options, **point, **options})


def grid_values(study: Study, row: Row, root: Path) -> List[Tuple[Dict[str, float], float]]:
    """Each point of a row's grid with its value; NaN where the run has not ended."""
    found = []
    for point in study.points:
        setting = _at(make_setting(row), point, study.validation)
        run = read_run(root / TUNING / setting.name / 'seed0')
        value = run.final(study.metric) if run.state == 'done' else None
        found.append((point, math.nan if value is None else value))
    return found


def choose(study: Study, row: Row, root: Path) -> Optional[Dict[str, float]]:
    """The best point of a row's grid, of equal ones the first; None where no run has ended."""
    ended = [(p, value) for p, value in grid_values(study, row, root) if not math.isnan(value)]
    return max(ended, key=lambda entry: entry[1])[0] if ended else None


def write_tuning(study: Study, rows: Sequence[Row], root: Path, out: Path) -> List[str]:
    """Writes ``tuning.csv``, every point of every grid, and tells the choices.

    Returns:
        list[str]: The same as Markdown, below the pretraining's accuracy.
    """
    text = []
    for kind in dict.fromkeys(row.pretrained for row in rows if row.pretrained):
        run = read_run(root / PRETRAINING / pretraining_setting(study, kind).name / 'seed0')
        if run.state == 'done':
            text.append(f'- pretraining with {kind}: top1 {run.final("top1"):.2f}')
    text = ['', '## Pretraining', '', *text] if text else []
    tuned = [row for row in rows if row.norm == study.tuned_for or not study.tuned_for]
    shown_rows, lines = [], []
    for row in tuned:
        chosen = choose(study, row, root)
        name = name_among(row, rows)
        cells = []
        for point, value in grid_values(study, row, root):
            shown = '' if math.isnan(value) else f'{value:.2f}'
            edge = study.at_edge(point)
            lines.append((name, _point(point), study.metric, shown, point == chosen, edge))
            cells.append(f'{_point(point)}: {shown or "no result"}')
        edge = ' (at the edge of the grid)' if chosen and study.at_edge(chosen) else ''
        won = f'{_point(chosen)}{edge}' if chosen else 'not run'
        shown_rows.append((name, won, '; '.join(cells)))
    write_csv(out / 'tuning.csv', COLUMNS, lines)
    if not tuned:  # the report is of other rows
        return text
    header = 'row', 'chosen', f'{study.metric} at each point of the grid'
    return [*text, '', '## Tuning, on the validation split', '', *table(header, shown_rows)]


def _point(point: Dict[str, float]) -> str:
    return ', '.join(f'{key.split(".")[-1]} {value:g}' for key, value in point.items())

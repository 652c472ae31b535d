"""The studies of tools/reproduce.py: their stages, what is chosen, what is told of it."""

import json
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmpretrain.datasets.categories import CIFAR10_CATEGORIES
from tool import read_csv, run_tool

from mmubn.cli.cfg_options import parse_value
from mmubn.datasets import pasted_scenes
from mmubn.reproduce import run_study
from mmubn.reproduce.cifar_scenes import make_cifar_scenes
from mmubn.reproduce.experiments import EXPERIMENTS, ROWS
from mmubn.reproduce.logs import SETTINGS, read_run
from mmubn.reproduce.study import LEARNING_RATE, WEIGHT_DECAY

TWO_IMAGES = EXPERIMENTS['batches-of-two']
RATES = TWO_IMAGES.study.grid[LEARNING_RATE]


def finish(job, value: float) -> None:
    """Leaves the logs of a finished run, without training."""
    logs = job.folder / '20260101_000000' / 'vis_data'
    logs.mkdir(parents=True, exist_ok=True)
    record = dict(job.settings, device='cpu: none', torch='2', commit='abc')
    (job.folder / SETTINGS).write_text(json.dumps(record))
    epochs = job.settings['epochs']
    lines = [
        dict(lr=0.1, time=0.1, loss=1.0, epoch=e, iter=e, step=e) for e in range(1, epochs + 1)
    ]
    key, scale = (
        ('coco/bbox_mAP', 100) if 'faster_rcnn' in str(job.folder) else ('accuracy/top1', 1)
    )
    lines.append({key: value / scale, 'step': epochs})
    (logs / 'scalars.json').write_text('\n'.join(map(json.dumps, lines)) + '\n')


@contextmanager
def instant_runs(folder):
    """Runs that end at once; the jobs of each call, and what a job reaches."""
    calls = []

    def value_of(job) -> float:
        return 50.0

    def run(jobs, parallel):
        calls.append(list(jobs))
        failed = []
        for job in jobs:
            value = run.value_of(job)
            if value is None:
                failed.append(f'{job.title}: diverged')
            else:
                finish(job, value)
        return failed

    run.value_of = value_of
    run.calls = calls
    for data in ('data/cifar10', 'data/cifar100', 'made/data'):
        (folder / data).mkdir(parents=True)
    changed = replace(TWO_IMAGES.study, prepare=lambda given, out: Path('made') / given)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(run_study, 'run_jobs', run)
        patch.setattr(run_study, 'training_images', lambda config, data: 50000)
        patch.setitem(EXPERIMENTS, TWO_IMAGES.name, replace(TWO_IMAGES, study=changed))
        yield run


@pytest.fixture
def stages(tmp_path):
    with instant_runs(tmp_path) as run:
        yield run


def options(job) -> dict:
    """The ``--cfg-options`` of a job."""
    return dict(
        entry.split('=', 1) for entry in job.arguments[job.arguments.index('--cfg-options') + 1 :]
    )


def rate(job) -> float:
    return float(options(job).get(LEARNING_RATE, 'nan'))


def run_rows(study, *rows, data='data', more=()):
    argv = [study, '--rows', *rows, '--data-root', data, '--work-dir', 'runs', *more]
    run_tool('reproduce', 'run', *argv)


def run_two(*more):
    run_rows('batches-of-two', 'BN', 'UBN', more=('--seeds', '2', *more))


def data_of(job) -> str:
    return job.arguments[job.arguments.index('--data-root') + 1]


BATCH = 'train_dataloader.batch_size'
BEST = {'BN': 0.03, 'UBN': 0.01}


@pytest.fixture(scope='module')
def tuned(tmp_path_factory):
    """The jobs of the three stages; each norm has its best rate. Then the report."""
    folder = tmp_path_factory.mktemp('tuned')
    with instant_runs(folder) as run:
        run.value_of = lambda job: 60.0 if rate(job) == BEST[job.setting.norm] else 40.0
        run_two()
        rows = ('--rows', 'BN', 'UBN', '--work-dir', 'runs', '--out', 'out')
        run_tool('reproduce', 'report', 'batches-of-two', *rows)
    return *run.calls, folder / 'out'


def test_each_row_is_tuned_then_trained_with_what_won(tuned):
    pretraining, tuning, training, _ = tuned
    assert [job.folder for job in pretraining] == [
        Path('runs/pretraining/resnet18_pretraining_cifar100-BN/seed0')
    ]
    assert [data_of(job) for job in pretraining] == ['data/cifar100']
    assert [rate(job) for job in tuning] == [r for _ in range(6) for r in RATES]
    assert {options(job)['val_dataloader.dataset.data_prefix.img'] for job in tuning} == {'val/'}
    batch_two = [job for job in training if BATCH not in options(job)]
    assert [(job.setting.norm, job.settings['seed'], rate(job)) for job in batch_two] == [
        ('BN', 0, 0.03),
        ('UBN', 0, 0.01),
        ('BN', 1, 0.03),
        ('UBN', 1, 0.01),
    ]
    for job in training:
        # The test split is the config's own.
        assert not any('ann_file' in key for key in options(job))
        assert data_of(job) == 'made/data'


def test_a_classifier_has_other_data_than_its_pretraining(stages):
    run_rows('fine-tuning', 'BN', more=('--seeds', '1'))
    pretraining, *others = stages.calls
    assert [data_of(job) for job in pretraining] == ['data/cifar100']
    assert {data_of(job) for jobs in others for job in jobs} == {'data/cifar10'}


def test_the_checkpoint_is_an_argument_and_in_no_record(tuned):
    _, tuning, training, _ = tuned
    for job in [*tuning, *training]:
        path = Path(parse_value(options(job)['model.backbone.init_cfg.checkpoint']))
        assert path.is_absolute()
        assert path.parts[-2:] == ('seed0', 'epoch_16.pth')
        assert not any('init_cfg' in option for option in job.settings['options'])


def test_a_failed_point_loses_and_is_told(stages, capsys):
    stages.value_of = lambda job: None if rate(job) == 0.03 else 100 * (1 - rate(job))
    with pytest.raises(SystemExit):
        run_two()
    assert {rate(job) for job in stages.calls[2]} == {0.001}
    assert 'lr=0.03/seed0: diverged' in capsys.readouterr().err
    text = Path('runs/report/report.md').read_text()
    assert '| BN | lr 0.001 (at the edge of the grid) | lr 0.001: 99.90; ' in text
    assert 'lr 0.03: no result |' in text


def test_without_a_single_result_it_stops(stages, capsys):
    stages.value_of = lambda job: None if run_study.TUNING in job.folder.parts else 50.0
    with pytest.raises(SystemExit):
        run_two()
    assert 'BN: no run of its grid ended; see runs/tuning' in capsys.readouterr().err
    assert len(stages.calls) == 2


def test_failures_are_told_where_nothing_was_trained(stages, capsys):
    stages.value_of = lambda job: None if job.folder.parent.parent.name == 'runs' else 50.0
    with pytest.raises(SystemExit):
        run_two()
    error = capsys.readouterr().err
    assert 'runs failed:\n  ' in error
    assert '-BN/seed0: diverged\n' in error
    assert 'no finished run' not in error


def test_the_strong_recipe_is_tuned_for_bn(stages):
    def value_of(job):
        decay = float(options(job)[WEIGHT_DECAY])
        return 60.0 if (rate(job), decay) == best else 40.0

    grid = EXPERIMENTS['strong-recipe'].study.grid
    best = grid[LEARNING_RATE][1], grid[WEIGHT_DECAY][2]
    stages.value_of = value_of
    run_rows('strong-recipe', 'UBN')
    tuning, training = stages.calls
    assert {job.setting.norm for job in tuning} == {'BN'}
    assert len(tuning) == 12
    assert {job.settings['epochs'] for job in tuning} == {4}
    assert [job.settings['seed'] for job in training] == [0, 1, 2]
    assert {(job.setting.norm, rate(job)) for job in training} == {('UBN', best[0])}
    assert {job.settings['epochs'] for job in training} == {24}


def test_every_norm_of_the_strong_recipe_is_tuned_for_itself(stages):
    best = {'BN': (0.4, 5e-4), 'UBN': (1.6, 1e-4)}  # UBN's point is in the wider grid alone

    def value_of(job):
        point = rate(job), float(options(job)[WEIGHT_DECAY])
        return 60.0 if point == best[job.setting.norm] else 40.0

    stages.value_of = value_of
    run_rows('strong-recipe-tuned', 'BN', '*, UBN')
    tuning, training = stages.calls
    assert len(tuning) == 2 * 20
    assert {
        (job.setting.norm, rate(job), float(options(job)[WEIGHT_DECAY])) for job in training
    } == {(norm, *point) for norm, point in best.items()}


def test_report_and_table_of_the_tuning(tuned):
    out = tuned[-1]
    text = (out / 'report.md').read_text()
    assert '- pretraining with BN: top1 40.00' in text
    grid = 'lr 0.001: 40.00; lr 0.003: 40.00; lr 0.01: 60.00; lr 0.03: 40.00'
    assert f'| UBN | lr 0.01 | {grid} |' in text
    rows = read_csv(out / 'tuning.csv')
    assert len(rows) == 6 * 4
    chosen = {(row['row'], row['setting']) for row in rows if row['chosen'] == 'True'}
    assert ('UBN, batch 8', 'lr 0.01') in chosen
    assert 'options `' not in text  # the chosen rates are no condition of all
    assert '| UBN, batch 8 | bbox_AP | 60.00 ± 0.00 | 2 done | +0.00 [' in text


def test_a_part_of_the_rows_finds_the_same_contrasts(stages):
    stages.value_of = lambda job: 70.0 if 'norm_eval=True' in str(job.folder) else 50.0
    run_rows('batches-of-two', 'UBN*', 'BN, frozen*', more=('--seeds', '2'))
    text = Path('runs/report/report.md').read_text()
    zero = '+0.00 [+0.00, +0.00]'
    assert f'| UBN, frozen statistics | BN, frozen statistics | bbox_AP | {zero} |' in text
    assert '| UBN | BN, frozen statistics | bbox_AP | -20.00 [-20.00, -20.00] |' in text


@pytest.mark.parametrize(
    ('option', 'key'),
    [
        (f'{LEARNING_RATE}=0.05', LEARNING_RATE),
        (f'{BATCH}=4', BATCH),  # of the rows with batches of 8 and 16
        ('val_evaluator.ann_file=x', 'val_evaluator.ann_file'),
        ('randomness.seed=7', 'randomness.seed'),
    ],
)
def test_what_a_study_sets_is_no_option_of_the_user(stages, capsys, option, key):
    with pytest.raises(SystemExit):
        run_two('--cfg-options', option)
    line = f'error: --cfg-options {key}: {key} is set for each run by reproduce.py; leave it out'
    assert capsys.readouterr().err.startswith(line)
    assert stages.calls == []


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (('strong-recipe', 'table3'), 'strong-recipe is a study: give it a command of its own'),
        (('strong-recipe', '--small'), 'strong-recipe is a study: it has its own network'),
        (('strong-recipe', '--epochs', '3'), '--epochs: a study has several trainings'),
        (('strong-recipe', '--eval-on-train'), '--eval-on-train: a study tunes on its validation'),
        (('strong-recipe',), 'run: a study needs --data-root'),
        (('batches-of-two', '--data-root', '.'), '--data-root: no folder cifar10; it needs'),
        (('fine-tuning', '--data-root', '.'), '--data-root: cifar10'),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        run_tool('reproduce', 'run', *argv)
    assert capsys.readouterr().err.startswith(f'error: {message}')
    assert list(tmp_path.iterdir()) == []


def make_cifars(folder: Path) -> None:
    """Class folders of noise, each class about a colour of its own."""
    rng = np.random.default_rng(0)
    classes = dict(cifar10=CIFAR10_CATEGORIES)
    classes['cifar100'] = [f'class{number:03d}' for number in range(100)]
    for name, names in classes.items():
        for split, count in (('train', 4), ('test', 1)):
            for label in names:
                place = folder / name / split / label
                place.mkdir(parents=True)
                colour = rng.integers(0, 256, 3)
                for number in range(count):
                    image = (colour + rng.normal(0, 30, (32, 32, 3))).clip(0, 255)
                    cv2.imwrite(str(place / f'{number}.png'), image.astype(np.uint8))


def test_scenes_of_each_split_are_of_other_pictures(tmp_path, monkeypatch):
    make_cifars(tmp_path)
    seen = {}
    monkeypatch.setattr(
        pasted_scenes, 'make_pasted_scenes', lambda out, splits, classes: seen.update(splits)
    )
    make_cifar_scenes(tmp_path, tmp_path / 'scenes')
    assert {name: len(p.objects) for name, p in seen.items()} == dict(train=36, val=4, test=10)
    assert {name: len(p.others) for name, p in seen.items()} == dict(train=360, val=40, test=100)
    assert [p.count for p in seen.values()] == [1200, 500, 1000]
    for kind in ('objects', 'others'):
        pictures = {
            name: {image.tobytes() for image in getattr(p, kind)} for name, p in seen.items()
        }
        assert not pictures['train'] & pictures['val']
        assert not pictures['train'] & pictures['test']
    # Labels are CIFAR-10's, colours are those of the files (BGR).
    label = seen['test'].labels[0]
    name = CIFAR10_CATEGORIES[label]
    file = cv2.imread(str(tmp_path / 'cifar10' / 'test' / name / '0.png'))
    assert np.array_equal(file, seen['test'].objects[0])


def test_a_split_that_cannot_be_divided_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_cifars(tmp_path / 'data')
    for folder, message in (
        ('data/cifar100', 'has 400 training images; the study tunes on the first 45000 and valid'),
        ('data', ''),
    ):
        with pytest.raises(SystemExit):
            run_rows('strong-recipe', 'UBN', data=folder)
        error = capsys.readouterr().err
        assert error.startswith(f'error: --data-root: {folder}')
        assert message in error
        assert error.count('\n') == 1
    assert not Path('runs').exists()


@pytest.mark.parametrize(('images', 'refused'), [(50000, False), (49999, True)])
def test_the_parts_of_a_split_may_not_overlap(stages, monkeypatch, images, refused):
    monkeypatch.setattr(run_study, 'training_images', lambda config, data: images)
    with pytest.raises(SystemExit) if refused else nullcontext():
        run_rows('strong-recipe', 'UBN')
    assert bool(stages.calls) is not refused


@pytest.mark.slow
def test_a_whole_study_on_a_tiny_budget(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    make_cifars(tmp_path / 'data')
    small = ['train_dataloader.dataset.indices=8', 'val_dataloader.dataset.indices=4']
    tiny = ('--budget', '0.01', '--seeds', '1', '--cfg-options', *small)
    run_rows('batches-of-two', 'UBN, no gate', more=tiny)
    assert '1 of 1 runs' not in capfd.readouterr().out
    row = next(r for r in ROWS if r.norm == 'UBN, no gate' and r.network)
    (folder,) = Path('runs').glob('faster_rcnn*/seed0')
    assert read_run(folder).state == 'done'
    assert 'BatchNorm checkpoint loaded into UBN layers' in (folder / 'output.log').read_text()
    values = run_study.grid_values(TWO_IMAGES.study, row, Path('runs'))
    assert all(value >= 0 for _, value in values)
    run_rows('batches-of-two', 'UBN, no gate', more=tiny)
    assert capfd.readouterr().out.count('1 of 1 runs are finished') == 2

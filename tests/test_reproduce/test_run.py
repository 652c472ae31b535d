"""The jobs of an experiment: their schedule, arguments and records."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hand_made import NET, write_run
from mmengine.config import Config

from mmubn.cli.cfg_options import parse_value
from mmubn.cli.errors import CommandError
from mmubn.paths import ROOT
from mmubn.reproduce import run
from mmubn.reproduce.experiments import select
from mmubn.reproduce.logs import SETTINGS, read_run
from mmubn.reproduce.run import Options, make_jobs, make_setting, scaled_schedule, work_dirs


def test_the_schedule_is_scaled_with_the_length():
    cfg = Config.fromfile(ROOT / 'configs' / 'cifar100' / 'resnet50_ubn_cifar100.py')
    assert scaled_schedule(cfg, 20) == {
        'train_cfg.max_epochs': 20,
        'param_scheduler.0.begin': 0,
        'param_scheduler.0.end': 1,  # a tenth of an epoch, in whole epochs
        'param_scheduler.1.milestones': [6, 12, 16],
    }
    cfg = Config.fromfile(ROOT / 'configs' / 'mask_rcnn_r50_ubn_1x_coco.py')
    options = scaled_schedule(cfg, 6)
    assert options['param_scheduler.0.end'] == 250  # iterations of the warm-up
    assert options['param_scheduler.1.milestones'] == [4, 6]
    cfg = Config.fromfile(ROOT / 'configs' / 'cifar10' / 'resnet18_bn_cifar10.py')
    scaled = scaled_schedule(cfg, 20)['param_scheduler.milestones']
    assert scaled == [10, 15]
    cfg.merge_from_dict(scaled_schedule(cfg, 20))
    assert cfg.param_scheduler.milestones == [10, 15]


TOLD = Options(
    seeds=1,
    budget=1,
    epochs=3,
    user_options=[],
    flags=[],
    data_root='one',
    gpus=0,
    condensation=False,
)


def jobs(work_dir='runs', chosen=(), **changes):
    rows = select(['table3'], ['BN'], one_network=True)
    settings = [make_setting(row, Path('net.py')) for row in rows]
    told = replace(TOLD, **changes)
    if told.data_root is not None:
        Path(told.data_root).mkdir(parents=True, exist_ok=True)
    return make_jobs(settings, Path(work_dir), told, chosen)


@pytest.mark.parametrize(
    ('changes', 'key'),
    [
        (dict(data_root='two'), 'data two'),
        (dict(data_root='other/one'), 'data_root .*other/one; .*change runs/.*run.json'),
        (dict(data_root=None), 'data None'),
        (dict(flags=['--eval-on-train']), r"flags \['--eval-on-train'\]"),
        (dict(gpus=2), 'gpus 2'),
        (dict(user_options=['a=1']), r"options .*'a=1'"),
        (dict(epochs=2), 'epochs 2'),
        ('batch_size = 3', 'config_digest [0-9a-f]{16}'),
    ],
)
def test_a_run_of_another_kind_is_refused(tmp_path, monkeypatch, changes, key):
    monkeypatch.chdir(tmp_path)
    config = Path('net.py')
    config.write_text(NET)
    (job,) = jobs()
    write_run(job.folder, 3, [[(1, 0.1, 10.0)]])
    (job.folder / SETTINGS).write_text(json.dumps(job.settings))
    assert [again.settings for again in jobs()] == [job.settings]
    if isinstance(changes, str):
        config.write_text(config.read_text() + changes)
        changes = {}
    changed = key.split()[0]
    with pytest.raises(
        CommandError, match=f'holds a run with {changed} .*, not .*{key.split()[-1]}'
    ):
        jobs(**changes)


@pytest.mark.parametrize(
    ('evaluator', 'message'),
    [('None', 'net.py: has no val_evaluator'), ("dict(type='VOCMetric')", 'the report reads top1')],
)
def test_a_config_without_a_value_for_the_report(tmp_path, monkeypatch, capsys, evaluator, message):
    monkeypatch.chdir(tmp_path)
    Path('net.py').write_text(f'{NET}val_evaluator = {evaluator}\n')
    if evaluator == 'None':
        with pytest.raises(CommandError, match=message):
            jobs()
    else:
        jobs()
        assert message in capsys.readouterr().err


def test_the_record_has_every_machine_that_a_training_was_on(logs, monkeypatch):
    (job,) = jobs(work_dir='others')
    monkeypatch.setattr(run, 'describe_run', lambda _: dict(commit='b', device='c', torch='2'))
    monkeypatch.setattr(run, '_start', lambda job: subprocess.Popen(['true']))
    job.folder.mkdir(parents=True)
    for commits in ('b', 'a; b'):  # begun anew, resumed
        (job.folder / SETTINGS).write_text(json.dumps({**job.settings, 'commit': 'a'}))
        (job.folder / 'output.log').touch()
        run.run_jobs([job], 1)
        assert read_run(job.folder).settings['commit'] == commits
        (job.folder / 'epoch_1.pth').touch()


def test_a_run_killed_before_its_last_validation_goes_back_one_checkpoint(logs):
    (job,) = jobs(work_dir='others')
    job.folder.mkdir(parents=True)
    for name in ('epoch_2.pth', 'epoch_3.pth'):
        (job.folder / name).touch()
    resume = job.arguments.index('--resume')
    (job.folder / 'last_checkpoint').write_text('epoch_2.pth')
    assert run._arguments(job) == job.arguments
    (job.folder / 'last_checkpoint').write_text('epoch_3.pth')
    arguments = run._arguments(job)
    assert arguments[resume + 1] == str(job.folder / 'epoch_2.pth')
    assert [*arguments[: resume + 1], *arguments[resume + 2 :]] == job.arguments
    # A resumed training would validate nothing.
    (job.folder / 'epoch_2.pth').unlink()
    assert run._arguments(job) == [a for a in job.arguments if a != '--resume']


@pytest.mark.parametrize(('keep', 'kept'), [(1, '2'), (3, None), (-1, None)])
def test_the_checkpoint_before_the_last_is_kept(logs, keep, kept):
    config = Path('net.py')
    config.write_text(
        f'{config.read_text()}default_hooks = dict(checkpoint=dict(max_keep_ckpts={keep}))\n'
    )
    (job,) = jobs(work_dir='others')
    options = dict(a.split('=', 1) for a in job.arguments if '=' in a)
    assert options.get('default_hooks.checkpoint.max_keep_ckpts') == kept


def test_the_data_root_is_checked_before_the_work_dirs(logs):
    (job,) = jobs(work_dir='others')
    write_run(job.folder, 3, [[(1, 0.1, 10.0)]])
    (job.folder / SETTINGS).write_text(json.dumps(job.settings))
    with pytest.raises(CommandError, match='--data-root: nodata is not a folder'):
        make_jobs([job.setting], Path('others'), replace(TOLD, data_root='nodata'))


def test_what_failed_before_it_trained_is_no_run(logs):
    (job,) = jobs(work_dir='others', user_options=['misspelt=1'])
    job.folder.mkdir(parents=True)
    (job.folder / SETTINGS).write_text(json.dumps(job.settings))
    (job.folder / 'output.log').write_text('error: misspelt')
    assert jobs(work_dir='others')
    (job.folder / 'epoch_1.pth').touch()
    with pytest.raises(CommandError, match='holds a run with options'):
        jobs(work_dir='others')


def test_only_seeds_are_runs(logs):
    for name in ('seed0_old', 'seed', 'seeds'):
        Path('runs/net-BN', name).mkdir()
    Path('runs/net-BN/seed3').touch()
    Path('runs/net-BN/seed10').mkdir()
    (job,) = jobs(work_dir='others')
    found = {seed: folder.name for seed, folder in work_dirs(Path('runs'), job.setting).items()}
    assert found == {seed: f'seed{seed}' for seed in (0, 1, 2, 10)}


def test_what_an_older_version_did_not_write_is_not_compared(logs):
    folder = Path('runs/net-BN/seed0')
    assert 'flags' not in read_run(folder).settings
    record = json.loads((folder / 'run.json').read_text())
    (folder / 'run.json').write_text(json.dumps({**record, 'options': [], 'data': 'one'}))
    old = read_run(folder).settings
    run._check_same(folder, {**old, 'flags': ['--amp']})


def test_trainings_side_by_side_share_the_threads(monkeypatch):
    monkeypatch.setattr(run.torch, 'get_num_threads', lambda: 8)
    monkeypatch.delenv('OMP_NUM_THREADS')  # conftest.py sets it
    assert [run.threads_of_each(jobs) for jobs in (1, 3, 16)] == [8, 2, 1]
    monkeypatch.setenv('OMP_NUM_THREADS', '8')
    assert run.threads_of_each(3) == 8


def test_condensation_is_recorded_where_it_can_be_and_is_wanted():
    cfg = Config.fromfile(ROOT / 'configs' / 'cifar10' / 'resnet18_small_cifar10.py')
    assert run._condensation_options(cfg, 'UBN', True) == {}
    others = [dict(hook) for hook in cfg.custom_hooks if hook.type != 'CondensationHook']
    assert len(others) == 3
    for norm, wanted in (('GN', True), ('UBN', False)):
        (option,) = run.as_arguments(run._condensation_options(cfg, norm, wanted))
        key, _, value = option.partition('=')
        assert (key, parse_value(value)) == ('custom_hooks', others)
    cfg.custom_hooks = others
    added = {'default_hooks.condensation.type': 'CondensationHook'}
    assert run._condensation_options(cfg, 'UBN', True) == added
    assert run._condensation_options(cfg, 'GN', True) == {}


@pytest.mark.parametrize(
    ('option', 'own'),
    [
        ('randomness.seed=7', 'randomness.seed'),
        ('randomness=7', 'randomness.seed'),
        ('model.backbone.norm_cfg.type=UBN', 'model.backbone.norm_cfg.type'),
        ('model.backbone=3', 'model.backbone.norm_cfg.type'),
        ('train_cfg.max_epochs=9', 'train_cfg.max_epochs'),
        ('param_scheduler.0.milestones=[9]', 'param_scheduler.0.milestones'),
        ('param_scheduler.0.milestones.0=9', 'param_scheduler.0.milestones'),
        ('optim_wrapper.optimizer.lr=0.05', 'optim_wrapper.optimizer.lr'),
    ],
)
def test_what_the_runs_differ_in_is_no_option_of_the_user(logs, option, own):
    config = Path('net.py')
    scheduler = "param_scheduler = [dict(type='MultiStepLR', milestones=[1, 2], gamma=0.1)]\n"
    config.write_text(config.read_text() + scheduler)
    key = option.split('=')[0]
    with pytest.raises(CommandError, match=f'--cfg-options {key}: {own} is set for each run'):
        jobs(user_options=['a=1', option], chosen=['optim_wrapper.optimizer.lr=0.1'])
    # Of the row itself.
    (row,) = select(['small-batches'], ['UBN, batch 2'], one_network=True)
    setting = make_setting(row, config)
    with pytest.raises(CommandError, match=r'optimizer\.lr is set for each run'):
        run.refuse_varied(['optim_wrapper.optimizer.lr=0.05'], setting, ())


def test_what_the_runs_share_is_an_option_of_the_user(logs):
    shared = ['optim_wrapper.optimizer.lr=0.05', 'model.backbone.norm_cfg.eps=1e-3']
    shared += ['train_cfg.val_interval=2', 'randomness.deterministic=True']
    (job,) = jobs(work_dir='others', user_options=shared)
    assert job.arguments[-4:] == job.settings['options'][-4:] == shared


def scaled(epochs: int, *schedulers) -> dict:
    cfg = Config(dict(train_cfg=dict(max_epochs=100), param_scheduler=list(schedulers)))
    return scaled_schedule(cfg, epochs)


def test_lengths_from_the_begin_on_end_where_the_end_does():
    warmed = dict(begin=5, end=100)
    options = scaled(
        10,
        dict(type='CosineAnnealingLR', T_max=95, **warmed),
        dict(type='OneCycleLR', total_steps=100),
        dict(type='CosineRestartLR', periods=[15, 15, 65], **warmed),
    )
    del options['train_cfg.max_epochs']
    assert options == {
        'param_scheduler.0.begin': 1,  # at least one
        'param_scheduler.0.end': 10,
        'param_scheduler.0.T_max': 9,
        'param_scheduler.1.total_steps': 10,
        'param_scheduler.2.begin': 1,
        'param_scheduler.2.end': 10,
        # Up to 20, 35 and 100 of 100 epochs.
        'param_scheduler.2.periods': [1, 2, 6],
    }


def test_a_schedule_of_unknown_times_is_not_shortened():
    for kind in ('ReduceOnPlateauLR', 'mmpretrain.CosineAnnealingCooldownLR'):
        scheduler = dict(type=kind, patience=5)
        assert scaled(100, scheduler) == {'train_cfg.max_epochs': 100}
        message = f'param_scheduler.0.type: how to shorten {kind} is not known'
        with pytest.raises(CommandError, match=message):
            scaled(50, scheduler)
    assert scaled(50, dict(type='mmdet.QuadraticWarmupLR', end=4))['param_scheduler.0.end'] == 2
    assert scaled(50, dict(type='PolyMomentum', end=4))['param_scheduler.0.end'] == 2

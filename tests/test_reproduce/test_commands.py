"""What reproduce.py lists and refuses."""

from pathlib import Path

import pytest
from tool import ROOT, run_tool

from mmubn.reproduce import commands

OTHER = str(ROOT / 'configs' / 'cifar100' / 'resnet18_small_cifar100.py')
SMALL = str(ROOT / 'configs' / 'cifar10' / 'resnet18_small_cifar10.py')
LICENSE = str(ROOT / 'LICENSE')


def test_list_names_the_state_of_each_row(logs, capsys):
    run_tool('reproduce', 'list', 'table3', '--config', 'net.py', '--work-dir', 'runs')
    out = capsys.readouterr().out
    host = "host's own BN: top1 79.9, top5 95.19"
    assert f'CIFAR-100, ResNet-50, UBN  [3 done]  paper: top1 78.67, top5 94.4  {host}\n' in out
    assert 'CIFAR-100, ResNet-50, RBN  [not run]  paper: top1 77.79, top5 94.2' in out


def test_settings_cut_short_are_one_line(logs, capsys):
    path = Path('runs/net-BN/seed0/run.json')
    path.write_text(path.read_text()[:-9])
    with pytest.raises(SystemExit):
        run_tool('reproduce', 'report', 'table3', '--config', 'net.py', '--work-dir', 'runs')
    assert capsys.readouterr().err.startswith(f'error: {path}: is cut short')


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (('list', 'table9'), 'no experiment table9; there are table2,'),
        (('list', 'table3', '--rows', 'LN'), '--rows LN: no such row; the norms are IN, GN, BN'),
        (('run',), 'run: name the experiments, such as table3'),
        (('run', 'table3', '--config', 'absent.py'), 'config: no file absent.py; the project has'),
        (('list', 'table3', '--config', '.'), 'config: no file .; the project has'),
        (('list', 'table3', '--config', LICENSE), f'config {LICENSE}: '),
        (('run', 'table5', '--config', SMALL), f'{SMALL} is for classif'),
        (('run', 'table3', '--cfg-options', 'a'), "--cfg-options: 'a' is not KEY=VALUE"),
        (
            ('run', 'table3', 'small-batches', '--auto-scale-lr'),
            '--auto-scale-lr: small-batches sets the learning rate itself, which would be scaled',
        ),
        (
            ('run', 'small-batches', '--cfg-options', 'auto_scale_lr.enable=True'),
            '--cfg-options auto_scale_lr.enable: small-batches sets the learning rate itself',
        ),
        (
            ('run', 'strong-recipe', '--data-root', '.', '--auto-scale-lr'),
            '--auto-scale-lr: strong-recipe sets the learning rate itself, which would be scaled',
        ),
        (
            ('run', 'small-batches', '--gpus', '2'),
            '--gpus 2: small-batches sets the learning rate itself, for the images of one process',
        ),
        (
            ('run', 'small-batches', '--config', OTHER),
            f'--config: small-batches sets the learning rate itself, for {Path(SMALL).name}; leave',
        ),
        (
            ('report', '--work-dir', 'nowhere'),
            'nowhere: no finished run of these rows; `run` trains them',
        ),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        run_tool('reproduce', *argv)
    assert capsys.readouterr().err.startswith(f'error: {message}')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ('lines', 'message'),
    [
        ('train_dataloader = train_cfg = optim_wrapper = None', 'config x.py: train_dataloader is'),
        (
            "train_cfg = dict(max_epochs='3')",
            'train_cfg.max_epochs: must be an integer from 1 on, g',
        ),
        ('param_scheduler = [None]', 'param_scheduler.0: must be a dict'),
        ('param_scheduler = [dict(T_max=3)]', 'param_scheduler.0'),
        (
            "param_scheduler = dict(_delete_=True, type='MultiStepLR', milestones=3)",
            "param_scheduler: MultiStepLR: 'int' object is not iterable",
        ),
        ("custom_hooks = ['a']", 'custom_hooks.0: '),
    ],
)
def test_a_config_that_cannot_be_trained(tmp_path, monkeypatch, capsys, lines, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commands, 'run_jobs', lambda jobs, parallel: [])
    Path('x.py').write_text(f'_base_ = {SMALL!r}\n{lines}\n')
    with pytest.raises(SystemExit):
        run_tool('reproduce', 'run', 'table3', '--config', 'x.py', '--work-dir', 'w')
    assert capsys.readouterr().err.startswith(f'error: {message}')
    assert not Path('w').exists()


@pytest.mark.parametrize(
    'argv',
    [
        ('small-batches', '--small', '--gpus', '1', '--cfg-options', 'auto_scale_lr.enable=False'),
        ('table7', '--auto-scale-lr', '--gpus', '2'),
        ('table7', '--small', '--auto-scale-lr'),
    ],
)
def test_learning_rates_that_nothing_else_sets(tmp_path, monkeypatch, argv):
    jobs = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commands, 'run_jobs', lambda found, parallel: jobs.extend(found) or [])
    run_tool('reproduce', 'run', *argv)
    assert jobs


def test_options_that_are_given_twice_add_up(tmp_path, monkeypatch):
    jobs = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commands, 'run_jobs', lambda found, parallel: jobs.extend(found) or [])
    options = '--cfg-options', 'model.a=1', 'model.b=2', '--cfg-options', 'model.c=3'
    run_tool('reproduce', 'run', 'table7', '--small', *options)
    assert all(job.settings['options'][-3:] == [*options[1:3], options[4]] for job in jobs)
    assert jobs


@pytest.mark.parametrize('value', ['nan', 'inf', '0'])
def test_budget_is_positive(capsys, value):
    with pytest.raises(SystemExit):
        run_tool('reproduce', 'run', 'table3', '--budget', value)
    assert f'argument --budget: must be positive and finite, got {value}' in capsys.readouterr().err

"""Optimizers and schedulers that refuse their arguments once they are built."""

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from told import told
from torch import nn

from mmubn.cli.optimizer_check import check_optimizer

STEP = dict(type='MultiStepLR', milestones=[1])
SOUND = dict(
    train_cfg=dict(by_epoch=True, max_epochs=3),
    optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1, momentum=0.9)),
)


def config(optimizer=None, schedulers=None, **train_cfg) -> Config:
    cfg = Config(SOUND)
    cfg.optim_wrapper.optimizer.update(optimizer or {})
    if schedulers is not None:
        cfg.param_scheduler = schedulers
    if train_cfg:
        cfg.train_cfg = train_cfg
    return cfg


def build(cfg: Config, folder) -> None:
    """Does what mmengine does with it before the first iteration."""
    loader = dict(
        dataset=[torch.ones(1)] * 2,
        batch_size=1,
        sampler=dict(type='DefaultSampler', shuffle=False),
    )
    runner = Runner(
        nn.Linear(1, 1),
        str(folder),
        train_dataloader=loader,
        experiment_name=folder.name,
        **cfg,
    )
    runner._train_loop = runner.build_train_loop(runner._train_loop)
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    runner.build_param_scheduler(runner.param_schedulers or [])


@pytest.mark.parametrize(
    'settings',
    [
        dict(),
        dict(schedulers=STEP),
        dict(schedulers=[dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=500), STEP]),
        dict(schedulers=[dict(type='LinearLR', end=1, convert_to_iter_based=True)]),
        dict(schedulers=[dict(type='CosineAnnealingLR', begin=1)]),
        dict(schedulers=[dict(type='CosineAnnealingMomentum', eta_min=0.8)]),
        dict(schedulers=[dict(type='OneCycleLR', eta_max=0.1, total_steps=3)]),
        dict(schedulers=[dict(type='PolyLR', by_epoch=False)], by_epoch=False, max_iters=9),
        dict(schedulers=[dict(type='LinearLR', by_epoch=False, begin=2, end=9)]),
    ],
)
def test_sound_settings(tmp_path, settings):
    build(config(**settings), tmp_path)
    check_optimizer(config(**settings), nn.Module())


@pytest.mark.parametrize(
    ('settings', 'line'),
    [
        (
            dict(optimizer=dict(momentum=0, nesterov=True)),
            'optim_wrapper.optimizer: SGD: Nesterov momentum requires a momentum and zero damp',
        ),
        (
            dict(optimizer=dict(dampening=0.1, nesterov=True)),
            'optim_wrapper.optimizer: SGD: Nesterov momentum requires a momentum and zero damp',
        ),
        (
            dict(schedulers=[dict(type='LinearLR', begin=5, end=2)]),
            'param_scheduler.0: LinearLR: end should be larger than begin, but got begin=5, end=2',
        ),
        (
            dict(schedulers=[STEP, dict(type='CosineAnnealingLR', begin=3)]),
            'param_scheduler.1: CosineAnnealingLR: end should be larger than begin, but got beg',
        ),
        (
            dict(schedulers=dict(type='MultiStepLR', milestones=3)),
            "param_scheduler: MultiStepLR: 'int' object is not iterable",
        ),
        (dict(schedulers=[None]), 'param_scheduler.0: must be a dict, got None; leave it out'),
        (
            dict(schedulers=[dict(type='LinearLR', start_factor=2)]),
            'param_scheduler.0: LinearLR: Starting multiplicative factor should',
        ),
        (
            dict(schedulers=[dict(type='ConstantLR', by_epoch=False, convert_to_iter_based=True)]),
            'param_scheduler.0: ConstantLR: Only epoch-based parameter scheduler can be convert',
        ),
    ],
)
def test_what_is_refused(tmp_path, settings, line):
    with pytest.raises((AssertionError, KeyError, TypeError, ValueError)):
        build(config(**settings), tmp_path)
    assert told(check_optimizer, config(**settings), nn.Module()).startswith(line)


def test_what_others_make_is_not_judged():
    wrong = dict(type='LinearLR', begin=5, end=2)
    for changes in (
        dict(optim_wrapper=dict(constructor='SomebodysOwn', optimizer=dict(type='SGD', lr=-1))),
        dict(optim_wrapper=dict(optimizer=dict(type='SomebodysOwn'))),
        dict(optim_wrapper=dict(constructor='Several', a=dict(optimizer=dict(type='SGD')))),
        dict(param_scheduler=dict(a=[wrong], b=[wrong])),
    ):
        check_optimizer(Config({**SOUND, **changes}), nn.Module())

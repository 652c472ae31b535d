"""What a resumed training is told of optimizer and schedule."""

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import CosineAnnealingLR, MultiStepLR, build_optim_wrapper
from torch import nn

from mmubn.cli.errors import CommandError
from mmubn.cli.resume_check import check_resumed

MILESTONES = dict(type='MultiStepLR', by_epoch=True, begin=0, milestones=[2, 4], gamma=0.1)


def config(type='SGD', lr=0.1, schedule=(MILESTONES,), wrapper=None, **settings) -> Config:
    optimizer = dict(type=type, lr=lr, **settings)
    return Config(
        dict(
            optim_wrapper=dict(type='OptimWrapper', optimizer=optimizer, **(wrapper or {})),
            param_scheduler=[dict(s) for s in schedule],
            train_cfg=dict(by_epoch=True, max_epochs=9),
            train_dataloader=dict(batch_size=16),
        )
    )


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))


def trained(cfg: Config, epochs: int = 3) -> dict:
    """The checkpoint after some epochs, its learning rate moved by the schedule."""
    net = model()
    wrapper = build_optim_wrapper(net, cfg.optim_wrapper)
    classes = dict(MultiStepLR=MultiStepLR, CosineAnnealingLR=CosineAnnealingLR)
    schedulers = []
    for scheduler in cfg.param_scheduler:
        settings = {k: v for k, v in scheduler.items() if k != 'type'}
        schedulers.append(classes[scheduler['type']](wrapper, **settings))
    for _ in range(epochs):
        wrapper.update_params(net(torch.randn(4, 2)).square().sum())
        for scheduler in schedulers:
            scheduler.step()
    return dict(
        meta=dict(epoch=epochs, iter=10 * epochs, cfg=cfg.pretty_text),
        optimizer=wrapper.state_dict(),
        param_schedulers=[scheduler.state_dict() for scheduler in schedulers],
    )


def warned(capsys, checkpoint: dict, cfg: Config) -> str:
    capsys.readouterr()  # what mmengine logged of the training, if a test before has set it up
    check_resumed(cfg, 'x.pth', checkpoint, model())
    return capsys.readouterr().err


def test_the_same_settings_say_nothing(capsys):
    paramwise = dict(paramwise_cfg=dict(norm_decay_mult=0.0, bias_lr_mult=2.0))
    for settings in (
        dict(momentum=0.9, weight_decay=1e-4, nesterov=True),
        dict(type='AdamW', betas=(0.9, 0.99)),
        dict(wrapper=paramwise, weight_decay=1e-4),
        dict(schedule=()),
        dict(schedule=(dict(type='CosineAnnealingLR', T_max=9, eta_min=0.0),)),
    ):
        cfg = config(**settings)
        assert warned(capsys, trained(cfg), cfg) == ''


def test_the_scaled_learning_rate_is_compared(capsys):
    checkpoint = trained(config(lr=0.05))
    cfg = config(lr=0.1)
    cfg.auto_scale_lr = dict(enable=True, base_batch_size=32)
    assert warned(capsys, checkpoint, cfg) == ''
    cfg.auto_scale_lr.enable = False
    assert 'optim_wrapper.optimizer.lr is 0.05, not 0.1' in warned(capsys, checkpoint, cfg)


@pytest.mark.parametrize(
    ('settings', 'expected'),
    [
        (dict(lr=0.01), 'optim_wrapper.optimizer.lr is 0.1, not 0.01'),
        (dict(momentum=0.8), 'optim_wrapper.optimizer.momentum is 0, not 0.8'),
        (
            dict(schedule=(dict(MILESTONES, milestones=[4, 6]),)),
            'param_scheduler.0.milestones is [2, 4], not [4, 6]',
        ),
        (dict(schedule=()), 'param_scheduler has 1 parts there, 0 in the config'),
    ],
)
def test_what_has_no_effect_is_told_in_one_line(capsys, settings, expected):
    (line,) = warned(capsys, trained(config()), config(**settings)).splitlines()
    assert line.startswith('warning: --resume: optimizer and schedule are those of x.pth: ')
    assert expected in line
    assert line.endswith(
        'start from its weights by --cfg-options load_from=x.pth, without --resume'
    )


def test_another_optimizer_is_refused():
    checkpoint = trained(config())
    expected = r'optimizer.type: x.pth holds the state of SGD, not of AdamW; resume with SGD, or'
    with pytest.raises(CommandError, match=expected):
        check_resumed(config('AdamW'), 'x.pth', checkpoint, model())
    with pytest.raises(CommandError, match='the state of Adam, not of AdamW'):
        check_resumed(config('AdamW'), 'x.pth', trained(config('Adam')), model())
    del checkpoint['meta']['cfg']
    with pytest.raises(CommandError, match='the state of another optimizer, not of AdamW'):
        check_resumed(config('AdamW'), 'x.pth', checkpoint, model())


def test_other_groups_of_parameters_are_refused():
    paramwise = config(wrapper=dict(paramwise_cfg=dict(norm_decay_mult=0.0)), weight_decay=1e-4)
    expected = (
        r'x.pth has 1 groups of 4 parameters, the config 4 of 4 \(optim_wrapper.paramwise_cfg'
    )
    with pytest.raises(CommandError, match=expected):
        check_resumed(paramwise, 'x.pth', trained(config()), model())


def test_a_checkpoint_without_optimizer(capsys):
    cfg = config()
    checkpoint = trained(cfg)
    del checkpoint['optimizer']
    assert warned(capsys, checkpoint, cfg) == (
        'warning: --resume: x.pth holds no state of the optimizer: it starts anew, without '
        'momentum\n'
    )
    checkpoint['optimizer'] = None
    expected = '--resume: in x.pth the state of the optimizer is None, which cannot be resumed; sta'
    with pytest.raises(CommandError, match=expected):
        check_resumed(cfg, 'x.pth', checkpoint, model())


def test_a_finished_training_is_told(capsys):
    cfg = config()
    checkpoint = trained(cfg)
    cfg.train_cfg.max_epochs = 3
    expected = 'x.pth has finished epoch 3, and train_cfg.max_epochs=3: nothing is left to train'
    assert expected in warned(capsys, checkpoint, cfg)


def test_several_optimizers_are_left_to_mmengine(capsys):
    cfg = config()
    cfg.optim_wrapper = dict(constructor='Own', first=dict(), second=dict())
    assert warned(capsys, trained(config()), cfg) == ''

"""What is read of a work dir."""

import json

import pytest
import torch
from hand_made import write_run
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from mmubn.cli.cfg_options import parse_value
from mmubn.reproduce import run as reproduce_run
from mmubn.reproduce.logs import read_run


def test_the_seconds_of_a_resumed_run(tmp_path):
    first = [(1, 0.1, 10.0), (2, 0.1, 20.0), (3, 0.1, 30.0)]
    second = [(3, 0.3, 33.0), (4, 0.3, 44.0)]
    write_run(tmp_path / 'seed0', 4, [first, second])
    run = read_run(tmp_path / 'seed0')
    assert run.seconds == pytest.approx({1: 1.5, 2: 3.0, 3: 7.5, 4: 12.0})
    assert run.state == 'done'
    assert run.epoch_reaching('top1', 20) == 2
    assert run.epoch_reaching('top1', 44.1) == 0


def test_the_loss_of_an_epoch_is_the_mean_of_its_iterations(tmp_path):
    write_run(tmp_path / 'seed0', 3, [[(1, 0.1, 10.0), (2, 0.1, 20.0)]])
    (log,) = tmp_path.glob('seed0/*/vis_data/scalars.json')
    begun = dict(lr=0.1, time=0.1, epoch=3, iter=40, step=40, loss=9.0)
    log.write_text(log.read_text().replace('{"cut', f'{json.dumps(begun)}\n'))
    run = read_run(tmp_path / 'seed0')
    # Ten iterations of the first value, five of one that is larger by 1.
    assert run.curves['loss'] == pytest.approx({1: 6 + 1 / 3, 2: 3 + 1 / 3, 3: 9.0})
    assert run.epoch == 2
    assert run.state == 'part'


class _LossOfANumber(BaseModel):
    """Its loss is the number of the iteration, from 1."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.iteration = 0

    def forward(self, inputs, mode='tensor'):
        self.iteration += 1
        return dict(loss=self.weight * 0 + self.iteration)


@pytest.mark.parametrize('length', [12, 4])
def test_the_loss_of_an_epoch_is_of_no_other(tmp_path, length):
    """What mmengine itself logs with the options of a job, of a config as mmdet's."""
    cfg = Config(
        dict(
            train_cfg=dict(by_epoch=True, max_epochs=3),
            default_hooks=dict(logger=dict(type='LoggerHook', interval=50)),
            log_processor=dict(type='LogProcessor', window_size=50, by_epoch=True),
        )
    )
    options = reproduce_run.as_arguments(reproduce_run._log_options(cfg))
    pairs = (option.split('=', 1) for option in options)
    cfg.merge_from_dict({key: parse_value(value) for key, value in pairs})
    Runner(
        _LossOfANumber(),
        str(tmp_path),
        train_dataloader=DataLoader([dict(inputs=torch.zeros(1))] * length),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
        experiment_name=tmp_path.name,
        **{key: dict(value) for key, value in cfg.items()},
    ).train()
    middle = (length + 1) / 2
    means = {epoch: middle + (epoch - 1) * length for epoch in (1, 2, 3)}
    assert read_run(tmp_path).curves['loss'] == pytest.approx(means)
    (log,) = tmp_path.glob('*/vis_data/scalars.json')
    lines = {line['step']: line for line in map(json.loads, log.read_text().splitlines())}
    if length == 12:
        assert lines[22]['loss'] == 17.5  # iterations 13 to 22


def test_no_objects_of_a_size_is_no_value(tmp_path):
    write_run(tmp_path / 'seed0', 1, [[(1, 0.1, 10.0)]])
    (log,) = tmp_path.glob('seed0/*/vis_data/scalars.json')
    values = {'coco/bbox_mAP': 0.25, 'coco/bbox_mAP_s': -1.0, 'coco/bbox_mAP_m': 0.0}
    text = log.read_text()
    log.write_text(text.replace('"accuracy/top1": 10.0', json.dumps(values)[1:-1]))
    run = read_run(tmp_path / 'seed0')
    del run.curves['loss']
    assert run.curves == {'bbox_AP': {1: 25.0}, 'bbox_APm': {1: 0.0}}
    # Validated all the same, where there are no objects at all.
    log.write_text(text.replace('"accuracy/top1": 10.0', '"coco/bbox_mAP": -1'))
    run = read_run(tmp_path / 'seed0')
    assert (run.state, run.final('bbox_AP')) == ('done', None)

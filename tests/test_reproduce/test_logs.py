"""What is read of a work dir."""

import json

import pytest
from hand_made import write_run

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

"""The demo trains with the stand-in as it does with mmcv's compiled operators."""

import pytest
import torch
from stand_in import users
from tool import CONFIGS

pytest.importorskip('mmdet')

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmubn.datasets.scenes import make_scenes

CONFIG = CONFIGS / 'demo' / 'mask_rcnn_r18_ubn_scenes.py'
ITERATIONS = 20


class _Losses(Hook):
    def __init__(self):
        self.seen = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.seen.append({name: value.item() for name, value in outputs.items()})


def train(scenes, work_dir):
    """The losses of each iteration, and the state at the end."""
    config = Config.fromfile(CONFIG)
    config.work_dir, config.experiment_name = str(work_dir), work_dir.name
    loader = config.train_dataloader
    loader.update(num_workers=0, persistent_workers=False)
    loader.dataset.data_root = str(scenes)
    config.train_cfg = dict(by_epoch=True, max_epochs=1, val_interval=2)
    config.val_cfg = config.val_dataloader = config.val_evaluator = None
    config.test_cfg = config.test_dataloader = config.test_evaluator = None
    config.custom_hooks = []
    runner = Runner.from_cfg(config)
    losses = _Losses()
    runner.register_hook(losses)
    runner.train()
    return losses.seen, runner.model.state_dict()


@pytest.mark.slow
def test_losses_and_state_are_those_of_the_compiled_operators(compiled, monkeypatch, tmp_path):
    batch = Config.fromfile(CONFIG).train_dataloader.batch_size
    make_scenes(tmp_path / 'scenes', num_train=ITERATIONS * batch, num_val=1)
    losses, state = train(tmp_path / 'scenes', tmp_path / 'stand_in')
    for module in users():
        monkeypatch.setattr(module, 'ext_module', compiled)
    expected_losses, expected_state = train(tmp_path / 'scenes', tmp_path / 'compiled')
    assert len(losses) == ITERATIONS
    for step, expected in zip(losses, expected_losses):
        assert step == pytest.approx(expected, rel=1e-5)
    assert losses[0] != losses[-1]
    for name, value in expected_state.items():
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5, msg=name)

"""Hooks of mmengine and mmpretrain on models with UBN."""

import copy

import pytest
import torch
from mmengine.hooks import EMAHook, SyncBuffersHook
from toy_runner import ToyImages, ToyNet, make_runner
from weights import assert_same_state

pytest.importorskip('mmpretrain')
STATISTICS = {'running_mean', 'running_var', 'num_batches_tracked'}


def test_precise_bn_measures_through_a_shut_gate():
    """PreciseBN's averages are those of the batches, whatever the gate, and the rest stays."""
    from mmpretrain.engine.hooks.precise_bn_hook import update_bn_stats

    model = ToyNet(fct=1.0, fct_warmup=0).train()  # the gate is shut
    before = copy.deepcopy(model.state_dict())
    expected = copy.deepcopy(model)
    expected.norm.fct = None
    for measured in (model, expected):
        loader = torch.utils.data.DataLoader(ToyImages(), batch_size=8)
        update_bn_stats(measured, loader, num_samples=32, logger='silent')
    assert_same_state(model, expected, rtol=1e-5, atol=1e-6)
    moved = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert {name.split('.')[-1] for name in moved} == STATISTICS
    assert model.norm.momentum == 0.1


def test_ema_and_resume_are_exact(tmp_path):
    hooks = [dict(type=EMAHook, update_buffers=True), dict(type=SyncBuffersHook)]
    whole = make_runner(tmp_path / 'whole', hooks=hooks, epochs=3)
    rest = [make_runner(tmp_path / 'parts', hooks=hooks, epochs=e, resume=e > 1) for e in (1, 3)]
    for runner in (whole, *rest):
        runner.train()
    assert_same_state(rest[-1].model, whole.model)
    averaged = torch.load(tmp_path / 'whole' / 'epoch_3.pth', weights_only=False)['state_dict']
    assert 0 < averaged['norm.running_similarity'] < 1
    assert averaged['norm.num_batches_tracked'].dtype == torch.long


def test_gradient_accumulation_moves_statistics_every_forward(tmp_path):
    wrapper = dict(optimizer=dict(type='SGD', lr=0.1), accumulative_counts=2)
    runner = make_runner(tmp_path, optim_wrapper=wrapper)
    runner.train()
    assert runner.model.norm.num_batches_tracked == 2 * 8  # it is called twice

"""Steps with NaN are stopped or skipped, and traced to the layer they come from."""

import copy
import random
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import HOOKS, OPTIM_WRAPPERS
from processes import in_processes
from torch import nn
from toy_runner import (
    ToyImages,
    ToyNet,
    assert_same_training,
    everything,
    hook_of,
    loader,
    log_of,
    make_runner,
)

import mmubn
from mmubn.hooks import CondensationHook, NonFiniteHook

HOOK = dict(type='NonFiniteHook')
SKIP = dict(type='NonFiniteHook', action='skip')


class SpoiltImages(ToyImages):
    """Some of the images hold a NaN."""

    def __init__(self, spoilt):
        super().__init__()
        for index in spoilt:
            self.images[index, 0, 3, 3] = float('nan')


class Log(nn.Module):
    def forward(self, x):
        return x.log()


def ubn_net():
    """A ToyNet with UBN alone."""
    torch.manual_seed(0)
    net = ToyNet()
    net.stem[1] = mmubn.UBN(8)
    return net


def run(tmp_path, model, spoilt=(), hook=HOOK, shuffle=False, **options):
    data = loader(SpoiltImages(spoilt), shuffle=shuffle)
    runner = make_runner(
        tmp_path, model, [hook], val=False, train_dataloader=data, **{'epochs': 1, **options}
    )
    runner.train()
    return runner


def test_stops_before_the_step_and_names_the_layer(tmp_path):
    model = ubn_net()
    model.layer1[1] = nn.Sequential(model.layer1[1], Log())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FloatingPointError) as caught:
        run(tmp_path, model)
    assert str(caught.value) == (
        'iteration 1: the losses loss are not finite: the first layer with such output is '
        'layer1.1.1 (Log), from finite input and weights. No weight was changed.'
    )
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_names_images_and_broken_weights(tmp_path):
    with pytest.raises(FloatingPointError) as caught:
        run(tmp_path / 'images', ubn_net(), spoilt=[17])
    assert 'iteration 3: ' in str(caught.value)  # of batches of 8
    expected = 'data_preprocessor (BaseDataPreprocessor), whose input is not finite already: the im'
    assert expected in str(caught.value)

    model = ubn_net()
    with torch.no_grad():
        model.layer1[0].bias[2] = float('inf')
    blamed = r'layer1.0 \(Conv2d\), with NaN or infinity in its bias'
    with pytest.raises(FloatingPointError, match=blamed):
        run(tmp_path / 'weights', model)


class BackwardNaN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float('nan')


class BrokenBackward(nn.Module):
    def forward(self, x):
        return BackwardNaN.apply(x)


def test_gradient_alone(tmp_path):
    model = ubn_net()
    model.dropout = BrokenBackward()
    expected = 'every loss is finite, the gradient is not finite: every layer gives finite output'
    with pytest.raises(FloatingPointError, match=expected):
        run(tmp_path, model)


def test_skipped_batches_leave_no_trace(tmp_path):
    """Two runs, the second with a batch of NaN put among the same other batches."""
    whole = SpoiltImages([])
    whole.images, whole.labels = whole.images[8:], whole.labels[8:]
    options = dict(epochs=1, val=False)
    reference = make_runner(tmp_path / 'a', ubn_net(), train_dataloader=loader(whole), **options)
    reference.train()
    runner = run(tmp_path / 'b', ubn_net(), spoilt=[0, 5], hook=SKIP)
    assert all(map(torch.equal, everything(reference), everything(runner)))
    (line,) = [line for line in log_of(runner).splitlines() if 'not finite' in line]
    assert 'ERROR' in line
    assert line.endswith('Skipped this step.')


def test_a_batch_of_finite_features_moves_the_running_statistics(tmp_path):
    """The weights stay, and what the forward pass has done stays too."""
    model = ubn_net()
    model.dropout = BrokenBackward()
    before = copy.deepcopy(model)
    run(tmp_path, model, hook=SKIP)
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), model.parameters()))
    assert not torch.equal(before.stem[1].running_mean, model.stem[1].running_mean)
    assert model.stem[1].running_mean.isfinite().all()


def test_gives_up_after_skips_in_a_row(tmp_path):
    hook = dict(SKIP, max_skips=2)
    runner = run(tmp_path / 'apart', ubn_net(), spoilt=[0, 17], hook=hook)
    assert runner.iter == 4
    with pytest.raises(FloatingPointError, match=r'iteration 3: .* 2 such steps in a row'):
        run(tmp_path / 'together', ubn_net(), spoilt=[9, 17], hook=hook)


def test_accumulated_batches_are_all_looked_at(tmp_path):
    wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1), accumulative_counts=2)
    with pytest.raises(FloatingPointError) as caught:
        run(tmp_path, ubn_net(), spoilt=[17], optim_wrapper=wrapper)
    assert str(caught.value).startswith('iteration 4: the losses loss are not finite: the first la')
    # Of the other batch there is nothing to tell.
    assert 'every loss is finite' not in str(caught.value)


def test_without_a_batch_at_fault_all_accumulated_are_told(tmp_path):
    model = ubn_net()
    model.dropout = BrokenBackward()
    wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1), accumulative_counts=2)
    with pytest.raises(FloatingPointError) as caught:
        run(tmp_path, model, optim_wrapper=wrapper)
    assert str(caught.value).count('every loss is finite, the gradient is not') == 2


def stopped_on_rank(folder, rank, world):
    model = MMDistributedDataParallel(ubn_net(), device_ids=None, broadcast_buffers=False)
    with pytest.raises(FloatingPointError) as caught:
        run(folder / 'run', model, spoilt=[17])  # the second process has the odd images
    return str(caught.value)


def test_a_process_with_a_sound_batch_blames_no_gradient_of_its_own(tmp_path):
    sound, spoilt = in_processes(partial(stopped_on_rank, tmp_path), 2, tmp_path)
    assert spoilt.startswith('iteration 2, process 1: the losses loss are not finite: the first l')
    assert sound.startswith('iteration 2, process 0: every loss is finite, the gradient is not fin')
    assert 'or in the batch of another process, which says so' in sound


class Scaled(OptimWrapper):
    """Skips every third step, as a loss scaler that tries a scale does."""

    steps = 0

    def step(self, **kwargs):
        self.steps += 1
        if self.steps % 3:
            super().step(**kwargs)


def test_steps_that_a_loss_scaler_skips_count_where_a_loss_is_bad(tmp_path):
    OPTIM_WRAPPERS.register_module(module=Scaled, force=True)
    wrapper = dict(type='Scaled', optimizer=dict(type='SGD', lr=0.1))
    assert run(tmp_path / 'finite', ubn_net(), optim_wrapper=wrapper).iter == 4
    with pytest.raises(FloatingPointError, match='iteration 3: the losses loss are not finite'):
        run(tmp_path / 'spoilt', ubn_net(), spoilt=[17], optim_wrapper=wrapper)


class Scaler(OptimWrapper):
    """Skips the steps whose gradient is not finite, as that of mixed precision does."""

    def step(self, **kwargs):
        gradients = [p.grad for g in self.optimizer.param_groups for p in g['params']]
        if all(g.isfinite().all() for g in gradients if g is not None):
            super().step(**kwargs)


@pytest.mark.parametrize('image', [1, 9])
def test_a_bad_loss_in_any_of_the_accumulated_batches_counts(image, tmp_path):
    OPTIM_WRAPPERS.register_module(module=Scaler, force=True)
    wrapper = dict(type='Scaler', optimizer=dict(type='SGD', lr=0.1), accumulative_counts=2)
    with pytest.raises(FloatingPointError, match=r'iteration 2: .*the losses loss are not finite'):
        run(tmp_path, ubn_net(), spoilt=[image], optim_wrapper=wrapper)


class Fused(torch.optim.SGD):
    """As one to which the loss scaler hands its finding."""

    def step(self, closure=None):
        found_inf, self.found_inf = self.found_inf, None
        if not found_inf:
            super().step(closure)


class HandsOn(OptimWrapper):
    def step(self, **kwargs):
        gradients = [p.grad for g in self.optimizer.param_groups for p in g['params']]
        sums = torch.stack([g.sum() for g in gradients if g is not None])
        self.optimizer.found_inf = (~sums.isfinite().all()).float()
        super().step(**kwargs)


def test_a_fused_optimizer_that_skips_has_not_stepped(tmp_path):
    model = ubn_net()
    wrapper = HandsOn(Fused(model.parameters(), 0.1))
    with pytest.raises(FloatingPointError, match='iteration 3: the losses loss are not finite'):
        run(tmp_path, model, spoilt=[17], optim_wrapper=wrapper)


class TwoOptimizers(ToyNet):
    """Trains its last layer with an optimizer of its own."""

    def train_step(self, data, optim_wrapper):
        loss = self(**self.data_preprocessor(data, True), mode='loss')['loss']
        loss.backward()
        for wrapper in optim_wrapper.values():
            wrapper.step()
            wrapper.zero_grad()
        return dict(loss=loss)


def of_parts(model, *names):
    """An optimizer of each."""
    wrappers = {
        name: OptimWrapper(torch.optim.SGD(model.get_submodule(name).parameters(), 0.1))
        for name in names
    }
    return OptimWrapperDict(**wrappers)


def test_several_optimizers(tmp_path):
    model = TwoOptimizers()
    with pytest.raises(FloatingPointError, match='iteration 1: the losses loss are not finite'):
        run(tmp_path, model, range(32), optim_wrapper=of_parts(model, 'fc', 'stem'))


class FirstSteps(TwoOptimizers):
    """Its second optimizer alone gets a gradient that is not finite."""

    def train_step(self, data, optim_wrapper):
        loss = self(**self.data_preprocessor(data, True), mode='loss')['loss']
        loss.backward()
        self.stem[0].weight.grad.fill_(float('inf'))
        for wrapper in optim_wrapper.values():
            wrapper.step()
        return dict(loss=loss)


def test_skips_of_one_optimizer_of_two_are_skips_in_a_row(tmp_path):
    model = FirstSteps()
    wrapper = of_parts(model, 'stem', 'fc')
    with pytest.raises(FloatingPointError, match=r'iteration 2: .* 2 such steps in a row'):
        run(tmp_path, model, hook=dict(SKIP, max_skips=2), optim_wrapper=wrapper)


def test_says_that_another_optimizer_has_stepped(tmp_path):
    model = FirstSteps()
    with pytest.raises(FloatingPointError, match='1 other optimizers had changed their weights'):
        run(tmp_path, model, optim_wrapper=of_parts(model, 'fc', 'stem'))


def test_needs_no_step_hook_of_torch(tmp_path, monkeypatch):
    # As torch 2.1 leaves the optimizers once torch.compile has run in the process.
    monkeypatch.setattr(torch.optim.SGD, 'step', torch.optim.SGD.step.__wrapped__)
    model = ubn_net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FloatingPointError, match=r'iteration 1: .* No weight was changed'):
        run(tmp_path, model, spoilt=range(32))
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_leaves_the_optimizer_as_it_was(tmp_path):
    schedule = dict(type='MultiStepLR', milestones=[1], by_epoch=False)
    runner = run(tmp_path / 'scheduled', ubn_net(), param_scheduler=[schedule])
    assert runner.optim_wrapper.get_lr()['lr'] == [pytest.approx(0.01)]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        runner.param_schedulers[0].step()
    model = ubn_net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    step = optimizer.step
    run(tmp_path / 'own', model, optim_wrapper=OptimWrapper(optimizer))
    assert optimizer.step == step


@HOOKS.register_module()
class CountingHook(Hook):
    """Puts a step of its own around that of the optimizer, and keeps it there."""

    def before_train(self, runner):
        self.steps, inner = 0, runner.optim_wrapper.optimizer.step

        def step(*args, **kwargs):
            self.steps += 1
            return inner(*args, **kwargs)

        runner.optim_wrapper.optimizer.step = step


def test_a_step_that_another_hook_put_around_it_stays(tmp_path):
    model = ubn_net()
    runner = make_runner(tmp_path, model, [HOOK, dict(type='CountingHook')], val=False, epochs=1)
    runner.train()
    counting = hook_of(runner, CountingHook)
    steps, optimizer = counting.steps, runner.optim_wrapper.optimizer
    assert steps == len(runner.train_dataloader)
    parameter = next(model.parameters())
    parameter.grad = torch.full_like(parameter, float('nan'))
    optimizer.step()  # after training, so nobody stops it
    assert counting.steps == steps + 1


def test_a_step_of_an_earlier_training_looks_no_more(tmp_path):
    """It is still there, inside that of another hook, and would see gradients already zeroed."""
    hooks = [dict(type='NonFiniteHook', action='skip', max_skips=2), dict(type='CountingHook')]
    runner = make_runner(tmp_path, ubn_net(), hooks, val=False, epochs=1)
    runner.train()
    runner.train_loop._epoch = runner.train_loop._iter = 0
    runner.train_dataloader.dataset.images.fill_(float('nan'))
    with pytest.raises(FloatingPointError, match='in a row'):
        runner.train()


def test_a_training_that_was_broken_off_is_watched_once(tmp_path):
    class Interrupted(Hook):
        def after_train_iter(self, runner, *args, **kwargs):
            if runner.iter == 1 and not runner.train_dataloader.dataset.images.isnan().all():
                raise KeyboardInterrupt

    model = ubn_net()
    hooks = [dict(SKIP, max_skips=2), Interrupted()]
    data = loader(SpoiltImages([9]))  # skips the second step, in which it is broken off
    runner = make_runner(tmp_path, model, hooks, val=False, epochs=1, train_dataloader=data)
    with pytest.raises(KeyboardInterrupt):
        runner.train()
    runner.train_loop._epoch = runner.train_loop._iter = 0
    runner.train_dataloader.dataset.images.fill_(float('nan'))
    with pytest.raises(FloatingPointError, match=r'iteration 2: .* 2 such steps in a row'):
        runner.train()
    assert len(hook_of(runner, NonFiniteHook)._watching) == 1


class PlainLoss(ToyNet):
    """Its train_step gives numbers, as LoggerHook takes them too."""

    def train_step(self, data, optim_wrapper):
        return {name: float(loss) for name, loss in super().train_step(data, optim_wrapper).items()}


def test_a_loss_may_be_a_number(tmp_path):
    assert run(tmp_path, PlainLoss()).iter == 4


class Mixed(ToyNet):
    """Its forward draws from all generators, and one draw gives NaN."""

    def forward(self, inputs, labels, mode='tensor'):
        drawn = [random.random(), np.random.rand(), float(torch.rand(()))]  # noqa: NPY002
        self.draws.append(drawn)
        if len({tuple(d) for d in self.draws}) == 2:
            inputs = inputs * float('nan')
        return super().forward(inputs, labels, mode)


def test_looks_again_with_the_same_random_numbers(tmp_path):
    model = Mixed()
    model.draws = []
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    run(tmp_path, model, hook=SKIP)
    once = model.draws[:2] + model.draws[3:]
    assert model.draws[2] == model.draws[1]
    assert len({tuple(d) for d in once}) == len(once) == 4
    model.draws = []
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    expected = [(random.random(), np.random.rand()) for _ in once]  # noqa: NPY002
    assert [tuple(d[:2]) for d in once] == expected


def test_a_second_look_is_not_recorded(tmp_path):
    model = ubn_net()
    model.dropout = BrokenBackward()
    runner = make_runner(
        tmp_path, model, [SKIP, dict(type='CondensationHook', interval=1)], val=False, epochs=1
    )
    hook = hook_of(runner, CondensationHook)
    counts, end = [], hook._end_period
    hook._end_period = lambda *args: (counts.append(hook._seen[:, 0, 1].tolist()), end(*args))
    runner.train()
    assert counts == [[4.0, 8.0]]  # the second layer is called twice


@pytest.mark.parametrize(
    ('bad', 'message'),
    [
        (dict(action='continue'), "action must be 'stop' or 'skip', got 'continue'"),
        (dict(max_skips=0), 'max_skips counts steps and must be positive, got 0'),
    ],
)
def test_settings_out_of_range(bad, message):
    with pytest.raises(ValueError, match=message):
        NonFiniteHook(**bad)


def test_costs_no_weight_and_no_random_number(tmp_path):
    assert_same_training(
        tmp_path,
        HOOK,
        model=lambda: ToyNet(dropout=0.5),
        train_dataloader=lambda: loader(ToyImages(augment=True), shuffle=True),
        val=False,
    )

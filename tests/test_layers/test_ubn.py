"""UBN against the literal equations, step by step, and against BatchNorm."""

import copy
from types import SimpleNamespace

import pytest
import torch
from against_batch_norm import assert_same_steps, pair
from against_reference import (
    LAYERS,
    MODES,
    Reference,
    assert_equals_reference,
    randomize,
    set_mode,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from weights import assert_same_state

from mmubn import layers
from mmubn.layers import UBN
from mmubn.ops import Buffers, Settings, reference
from mmubn.ops.step import _is_due


@st.composite
def inputs(draw, c):
    """Random shapes, 1x1 maps and single images among them, memory formats and strides."""
    n = draw(st.sampled_from([1, 2, 3, 9]))
    h = draw(st.sampled_from([1, 2, 3, 7, 16]))
    w = draw(st.sampled_from([1, 3, 4, 9]))
    if n * h * w == 1:
        n = 2
    layout = draw(st.sampled_from(['contiguous', 'channels_last', 'strided', 'expanded']))
    mean = draw(st.sampled_from([0.0, 3.0]))  # the one shuts the gate, the other opens it
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, c, 2 * h, w, dtype=torch.double, generator=generator) + mean
    if layout == 'strided':
        return x[:, :, ::2]
    x = x[:, :, :h].contiguous()
    if layout == 'channels_last':
        return x.contiguous(memory_format=torch.channels_last)
    if layout == 'expanded' and n > 1:
        return x[:1].expand(n, c, h, w)
    return x


@pytest.mark.parametrize('name', LAYERS)
@settings(max_examples=25, deadline=None)
@given(
    batches=st.integers(1, 5).flatmap(lambda c: st.lists(inputs(c), min_size=1, max_size=6)),
    seed=st.integers(0, 2**31),
)
def test_steps_equal_reference(name, batches, seed):
    """Several steps in a row in float64; mixed batches open and shut the gate between them."""
    torch.manual_seed(seed)
    layer = LAYERS[name](batches[0].shape[1]).double()
    if hasattr(layer, 'fct_momentum'):
        layer.fct_momentum = 0.7  # quick enough to cross the threshold within the steps
    randomize(layer)
    oracle = Reference(layer)
    for x in batches:
        assert_equals_reference(layer, oracle, x, rtol=1e-9, atol=1e-10)
    layer.eval()
    assert_equals_reference(layer, oracle, batches[0], rtol=1e-9, atol=1e-10)


def test_gate_opens_and_shuts():
    """The batches of the reference test really cross the threshold, both ways."""
    layer = UBN(4, fct_momentum=0.7, fct_warmup=0)
    oracle = Reference(layer)
    seen = []
    for offset in (0, 0, 0, 3, 3, 0, 0, 0):
        x = torch.randn(8, 4, 9, 9) + offset
        assert_equals_reference(layer, oracle, x, rtol=1e-4, atol=1e-5)
        seen.append(bool(layer.batch_statistics_used))
    assert seen == [True, False, False, True, True, True, False, False]


@pytest.mark.parametrize('mode', MODES)
def test_gradcheck(make_layer, mode):
    layer = make_layer(3).double()
    set_mode(layer, mode)
    randomize(layer)
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    names = [name for name, _ in layer.named_parameters()]

    def function(x, *parameters):
        return torch.func.functional_call(copy.deepcopy(layer), dict(zip(names, parameters)), (x,))

    x = torch.randn(3, 3, 4, 5, dtype=torch.double, requires_grad=True)
    parameters = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradcheck(function, (x, *parameters))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('momentum', [0.1, None])
@pytest.mark.parametrize('affine', [True, False])
def test_every_switch_off_is_batch_norm(dtype, momentum, affine):
    settings = dict(momentum=momentum, affine=affine, dtype=dtype)
    off = dict(fct=None, kernel_size=1, center=False, scale=False)
    assert_same_steps(*pair('UBN', off, **settings), dtype=dtype)


def test_never_filled_statistics_do_not_normalise():
    """Zero-mean noise has no similarity; the gate stays open until the statistics are filled."""
    layer = UBN(4, momentum=0.5)
    for step in range(40):
        layer(
            torch.randn(16, 4, 8, 8) * 5
            + torch.tensor([3.0, -3, 3, -3]).view(4, 1, 1) * (-1) ** step
        )
        assert bool(layer.batch_statistics_used) == (step < 20 or layer.running_similarity > 0.15)
    assert layer.num_batches_tracked >= 20


@pytest.mark.parametrize(('momentum', 'batches'), [(0.1, 100), (0.01, 1000), (0.0, 10)])
def test_warmup_follows_momentum(momentum, batches):
    layer = UBN(2, momentum=momentum)
    layer.running_similarity.zero_()
    x = torch.randn(8, 2, 4, 4)
    for tracked, batch_statistics in ((batches - 1, True), (batches, False)):
        layer.num_batches_tracked.fill_(tracked)
        layer(x)
        assert bool(layer.batch_statistics_used) is batch_statistics


def test_similarity_of_every_third_step():
    """Between measurements the running similarity rests; it forgets as fast as with every one."""
    layer = UBN(4, fct_interval=3, fct_momentum=0.2)
    tau = layer.running_similarity.clone()
    for step in range(7):
        x = torch.randn(8, 4, 6, 6) + step % 2
        layer(x)
        if step % 3 == 0:
            tau = 0.8**3 * tau + (1 - 0.8**3) * reference.mean_cosine_similarity(x)
        torch.testing.assert_close(layer.running_similarity, tau)


def test_no_cuda_graph_of_every_third_step(monkeypatch):
    """Replayed, it would measure in each step or in none."""
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: True)
    layer = UBN(4, fct_interval=3)
    layer(torch.randn(8, 4, 6, 6))  # on a CPU nothing is captured
    on_gpu = SimpleNamespace(is_cuda=True)
    buffers = Buffers(running_similarity=on_gpu, steps=torch.tensor(1))
    with pytest.raises(RuntimeError, match='set fct_interval=1'):
        _is_due(buffers, Settings(fct=0.15, interval=3))


def test_similarity_of_every_second_row_and_column():
    layer = UBN(4, fct_stride=2, fct_momentum=1.0)
    x = torch.randn(8, 4, 7, 6) + torch.arange(6.0)
    layer(x)
    expected = reference.mean_cosine_similarity(x[:, :, ::2, ::2])
    torch.testing.assert_close(layer.running_similarity, expected)
    assert (expected - reference.mean_cosine_similarity(x)).abs() > 1e-3


def test_evaluation_updates_nothing(make_layer):
    layer = make_layer(4)
    layer(torch.randn(4, 4, 5, 5) + 1)
    layer.eval()
    before = copy.deepcopy(layer.state_dict())
    layer(torch.randn(4, 4, 5, 5) - 2)
    assert_same_state(layer, before)


def test_training_step_between_evaluation_and_its_backward(make_layer):
    """Backward reads the running statistics that the evaluation saw."""
    layer = make_layer(4)
    layer(torch.randn(4, 4, 5, 5) + 1)
    x, upstream = torch.randn(2, 4, 5, 5), torch.randn(2, 4, 5, 5)
    gradients = []
    for in_between in (False, True):
        evaluated = copy.deepcopy(layer).eval()
        x.requires_grad_().grad = None
        y = evaluated(x)
        if in_between:
            evaluated.train()(torch.randn(4, 4, 5, 5))
        y.backward(upstream)
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_gradients_accumulate_after_an_empty_batch(make_layer):
    layer = make_layer(4)
    randomize(layer)
    with_empty = copy.deepcopy(layer)
    with_empty(torch.randn(0, 4, 5, 5)).sum().backward()
    x = torch.randn(3, 4, 5, 5)
    upstream = torch.randn_like(x)
    for module in (layer, with_empty):
        module(x).backward(upstream)
    for (name, expected), actual in zip(layer.named_parameters(), with_empty.parameters()):
        torch.testing.assert_close(actual.grad, expected.grad, msg=name)


def test_shut_gate_leaves_running_statistics():
    layer = UBN(4, fct=1.0, fct_warmup=0)
    layer.running_mean.normal_()
    before = copy.deepcopy(layer.state_dict())
    layer(torch.randn(4, 4, 5, 5))
    after = layer.state_dict()
    for name in ('running_mean', 'running_var', 'num_batches_tracked'):
        assert torch.equal(after[name], before[name]), name
    assert after['running_similarity'] < before['running_similarity']


def test_state_dict_names():
    full = ['weight', 'bias', 'kernel', 'center_weight', 'scale_weight', 'scale_bias']
    buffers = ['running_mean', 'running_var', 'num_batches_tracked', 'running_similarity']
    assert list(UBN(3).state_dict()) == full + buffers
    shapes = {
        name: tuple(value.shape) for name, value in UBN(3, kernel_size=5).state_dict().items()
    }
    assert shapes == {name: (3,) for name in full} | {
        'kernel': (3, 1, 5, 5),
        'running_mean': (3,),
        'running_var': (3,),
        'num_batches_tracked': (),
        'running_similarity': (),
    }
    off = UBN(3, fct=None, kernel_size=1, center=False, scale=False)
    assert list(off.state_dict()) == full[:2] + buffers


@pytest.mark.parametrize('kind', layers.__all__)
def test_without_a_bias(kind):
    layer, full = (getattr(layers, kind)(3, bias=bias) for bias in (False, True))
    assert 'bias=False' in repr(layer)
    assert full.state_dict().keys() - layer.state_dict().keys() == {'bias'}
    full.load_state_dict({**layer.state_dict(), 'bias': torch.zeros(3)})
    x, dy = torch.randn(2, 2, 3, 4, 5)
    results = []
    for norm in (layer, full):
        own = x.clone().requires_grad_()
        y = norm(own)
        y.backward(dy)
        results.append((y, own.grad, norm.weight.grad))
    for own, expected in zip(*results):
        torch.testing.assert_close(own, expected)
    layer.weight.data.fill_(7)
    layer.reset_parameters()
    assert (layer.weight == 1).all()
    assert layer.bias is None


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(fctt=0.2), "unknown key 'fctt', did you mean 'fct'"),
        (dict(kernelsize=3), "unknown key 'kernelsize', did you mean 'kernel_size'"),
        (dict(qqq=3), "unknown key 'qqq'; it takes num_features, eps"),
        (dict(kernel_size=4), 'kernel_size must be a positive odd integer, got 4'),
        (dict(track_running_stats=False), 'fct needs running statistics'),
        (dict(bias=torch.zeros(3)), r'bias must be True or False, got tensor'),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises((TypeError, ValueError), match=message):
        UBN(3, **settings)


@pytest.mark.parametrize(
    ('shape', 'message'),
    [
        ((2, 3, 4), r'expected 4D input \(got 3D input\)'),
        ((2, 4, 5, 5), 'expected 3 channels, got input size'),
        ((1, 3, 1, 1), 'Expected more than 1 value per channel when training'),
    ],
)
def test_bad_input(shape, message):
    with pytest.raises(ValueError, match=message):
        UBN(3)(torch.randn(shape))


def test_repr():
    assert repr(UBN(8, fct=0.2)).startswith('UBN(8, eps=1e-05, momentum=0.1, affine=True')
    assert 'fct=0.2' in repr(UBN(8, fct=0.2))

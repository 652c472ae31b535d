"""Half precision, extreme scales, and inputs that must not poison a layer."""

import copy
import functools
from contextlib import nullcontext

import pytest
import torch
from against_reference import LAYERS, Reference, assert_equals_reference, randomize
from torch import nn
from weights import assert_same_state

from mmubn.condensation import record_condensation
from mmubn.layers import RBN, UBN


def literal(layer, dtype):
    """The reference in ``dtype`` throughout."""
    oracle = Reference(layer)
    oracle.params = {n: p.detach().to(dtype).requires_grad_() for n, p in oracle.params.items()}
    oracle.buffers = {
        n: b if b.dtype == torch.long else b.to(dtype) for n, b in oracle.buffers.items()
    }
    return oracle


FLOAT16 = pytest.param(
    torch.float16, marks=pytest.mark.newer_torch('no float16 matrix product on a CPU')
)


@pytest.mark.parametrize('dtype', [FLOAT16, torch.bfloat16])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_half_precision_is_no_worse_than_eager(make_layer, dtype, layout):
    """At most twice the error that the literal equations make in the same dtype."""
    layer = make_layer(6)
    randomize(layer)
    x = (3 * torch.randn(8, 6, 9, 10) + 1).to(dtype).contiguous(memory_format=layout)
    upstream = torch.randn(x.shape).to(dtype)

    def run(function, value):
        value = value.detach().clone().requires_grad_()
        y = function(value)
        y.backward(upstream.to(y.dtype))
        return y.detach().double(), value.grad.double()

    exact = run(literal(layer, torch.float64), x.double())
    eager = run(literal(layer, dtype), x)
    with torch.autocast('cpu', dtype=dtype):
        actual = run(layer, x)
        y = layer(x)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=layout)
    for ours, theirs, truth in zip(actual, eager, exact):
        assert (ours - truth).abs().max() <= 2 * (theirs - truth).abs().max()
    assert all(value.dtype != dtype for value in layer.state_dict().values())


def test_large_mean_small_deviation(make_layer):
    """Mean 1e4, deviation 1e-1 (input resolution 1e-3), where E[x^2] - E[x]^2 would be noise."""
    layer = make_layer(3)
    layer.eps = 1e-10
    layer.running_mean.fill_(1e4)
    x = 1e4 + 0.1 * torch.randn(8, 3, 16, 16)
    exact = Reference(layer)(x.double())
    assert (layer(x).double() - exact).abs().max() <= 0.02 * exact.abs().max()


def test_tiny_activations(make_layer):
    layer = make_layer(3)
    layer.eps = 1e-20
    randomize(layer)
    oracle = Reference(layer)
    x = 1e-3 * torch.randn(8, 3, 16, 16)
    assert_equals_reference(layer, oracle, x, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('backend', ['auto', 'torch'])
def test_huge_activations(make_layer, backend):
    """Deviations of 1e16: the cube of 1 / sigma is below every number of float32."""
    layer = make_layer(3)
    layer.backend = backend
    randomize(layer)
    oracle = Reference(layer)
    inputs, upstream = 1e16 * torch.randn(2, 8, 3, 9, 9)  # so that the gradient is about 1
    gradients = []
    for function, dtype in ((layer, torch.float32), (oracle, torch.float64)):
        x = inputs.to(dtype, copy=True).requires_grad_()
        function(x).backward(upstream.to(dtype))
        gradients.append(x.grad.double())
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('backend', ['auto', 'torch'])
def test_at_momentum_1_nothing_is_left_of_the_old_statistics(backend):
    """PreciseBN reads the statistics of a batch so."""
    layer = RBN(3, momentum=1.0, backend=backend)
    bn = nn.BatchNorm2d(3, momentum=1.0)
    x = 0.1 * torch.randn(4, 3, 5, 5)
    for norm in (layer, bn):
        norm.running_var.fill_(1e7)
        norm.running_mean.fill_(1e7)
        norm(x)
    torch.testing.assert_close(layer.running_var, bn.running_var)
    torch.testing.assert_close(layer.running_mean, bn.running_mean)


def test_images_of_zeros():
    x = torch.randn(6, 3, 4, 4)
    x[[1, 4]] = 0
    layer = UBN(3)
    assert_equals_reference(layer, Reference(layer), x, rtol=1e-4, atol=1e-5)
    assert torch.isfinite(layer(torch.zeros(4, 3, 2, 2))).all()


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_one_bad_image_poisons_nothing(make_layer, bad):
    layer = make_layer(3)
    good = torch.randn(4, 3, 5, 5) + 1
    layer(good)
    before = copy.deepcopy(layer.state_dict())
    broken = good.clone()
    broken[2] = bad
    assert not torch.isfinite(layer(broken)).all()  # shown, as BatchNorm would, and not hidden
    assert_same_state(layer, before)
    layer.zero_grad()
    layer(good).square().mean().backward()
    for name, parameter in layer.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name


def test_one_image_leaves_the_similarity():
    layer = UBN(3, fct_warmup=0)
    layer(torch.randn(4, 3, 5, 5))
    before = layer.running_similarity.clone()
    layer(torch.randn(1, 3, 5, 5))
    assert torch.equal(layer.running_similarity, before)


@pytest.mark.parametrize('training', [True, False])
def test_empty_batch(make_layer, training):
    layer = make_layer(3).train(training)
    before = copy.deepcopy(layer.state_dict())
    x = torch.empty(0, 3, 7, 7, requires_grad=True)
    y = layer(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad.shape == x.shape
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name
    assert_same_state(layer, before)


def test_half_precision_model():
    """``.half()`` of a whole network, as for inference."""
    norm = RBN(4)
    norm(torch.randn(8, 4, 6, 6))
    norm.eval()
    x = torch.randn(2, 4, 6, 6)
    expected = norm(x)
    actual = norm.half()(x.half())
    assert actual.dtype == torch.float16
    torch.testing.assert_close(actual.float(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize('checkpoint', ['reentrant', 'non-reentrant'])
@pytest.mark.parametrize('name', ['ubn', 'rbn'])
def test_activation_checkpointing(name, checkpoint):
    """The segment runs twice: statistics move once, the gate stays, even as its warm-up ends."""
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), LAYERS[name](4), nn.ReLU())
    if name == 'ubn':
        plain[1].fct_warmup = 3
        plain[1].fct = 0.99
    wrapped = copy.deepcopy(plain)
    for _ in range(5):
        x = torch.randn(4, 3, 8, 8, requires_grad=True)
        y = plain(x)
        upstream = torch.randn_like(y)
        y.backward(upstream)
        again = x.detach().clone().requires_grad_()
        torch.utils.checkpoint.checkpoint(
            wrapped, again, use_reentrant=checkpoint == 'reentrant'
        ).backward(upstream)
        torch.testing.assert_close(again.grad, x.grad)
    assert_same_state(wrapped, plain)
    for parameter, other in zip(plain.parameters(), wrapped.parameters()):
        torch.testing.assert_close(other.grad, parameter.grad)


@pytest.mark.skipif(
    not hasattr(torch.utils.checkpoint, 'create_selective_checkpoint_contexts'),
    reason='selective checkpointing came with torch 2.4',
)
@pytest.mark.parametrize('backend', ['auto', 'torch'])
@pytest.mark.parametrize('operation', ['sum.default', 'where.self', 'div.Tensor', 'mul.Tensor'])
@pytest.mark.parametrize('watched', [False, True], ids=['', 'condensation recorded'])
def test_selective_activation_checkpointing(backend, operation, watched):
    """It finds the outputs it kept by their order, and the second run measures nothing."""
    packet, overload = operation.split('.')
    kept = [getattr(getattr(torch.ops.aten, packet), overload)]
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), UBN(4, backend=backend), nn.Sigmoid())
    selective = copy.deepcopy(plain)
    x = torch.randn(4, 3, 8, 8, requires_grad=True)
    again = x.detach().clone().requires_grad_()
    contexts = functools.partial(torch.utils.checkpoint.create_selective_checkpoint_contexts, kept)
    with record_condensation(selective) if watched else nullcontext():
        # The product after the layer is kept too.
        y = torch.utils.checkpoint.checkpoint(
            lambda x: selective(x) * x.sum(), again, use_reentrant=False, context_fn=contexts
        )
        upstream = torch.randn_like(y)
        y.backward(upstream)
    (plain(x) * x.sum()).backward(upstream)
    torch.testing.assert_close(again.grad, x.grad)
    assert_same_state(selective, plain)
    for parameter, other in zip(plain.parameters(), selective.parameters()):
        torch.testing.assert_close(other.grad, parameter.grad)


@pytest.mark.parametrize('momentum', [0, 1e-320])
def test_a_momentum_that_moves_nothing(momentum):
    layer = UBN(4, momentum=momentum)
    layer(torch.randn(2, 4, 3, 3))
    assert torch.equal(layer.running_mean, torch.zeros(4))
    assert layer.batch_statistics_used


def test_shared_layer_and_double_forward(make_layer):
    """Two calls before one backward: the gradients of each call are those of its own statistics."""
    layer = make_layer(3).double()
    randomize(layer)
    oracle = Reference(layer)
    inputs = [torch.randn(4, 3, 5, 5, dtype=torch.double) + offset for offset in (0, 2)]
    ours = [x.clone().requires_grad_() for x in inputs]
    theirs = [x.clone().requires_grad_() for x in inputs]
    upstream = torch.randn(2, 4, 3, 5, 5, dtype=torch.double)
    torch.stack([layer(x) for x in ours]).backward(upstream)
    torch.stack([oracle(x) for x in theirs]).backward(upstream)
    for x, y in zip(ours, theirs):
        torch.testing.assert_close(x.grad, y.grad)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, oracle.params[name].grad, msg=name)

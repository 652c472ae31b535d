"""Gradients of gradients, torch.func and forward mode, as BatchNorm has them."""

import copy

import pytest
import torch
from against_reference import MODES, randomize, set_mode
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, stack_module_state, vmap

from mmubn.layers import UBN


def stepped(layer, training=False):
    """The layer after a training step, with random parameters."""
    randomize(layer)
    channels = layer.num_features
    layer(torch.randn(6, channels, 5, 4, dtype=layer.running_mean.dtype) + 1)
    return layer.train(training)


@pytest.mark.parametrize('mode', MODES)
def test_gradients_of_gradients(make_layer, mode):
    layer = stepped(make_layer(2).double())
    set_mode(layer, mode)
    names = [name for name, _ in layer.named_parameters()]

    def function(x, *parameters):
        return functional_call(copy.deepcopy(layer), dict(zip(names, parameters)), (x,))

    x = torch.randn(3, 2, 3, 2, dtype=torch.double)
    x[1, 1] = 0.5  # a constant plane, as dead channels have
    parameters = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradgradcheck(function, (x.requires_grad_(), *parameters), fast_mode=True)


def test_gradient_penalty_is_that_of_batch_norm():
    """WGAN-GP and the like, with what follows the layer linear and frozen."""
    gradients = []
    for norm in (nn.BatchNorm2d(4), UBN(4, fct=None, kernel_size=1, center=False, scale=False)):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), norm).double()
        x = torch.randn(4, 3, 6, 6, dtype=torch.double, requires_grad=True)
        y = (net(x) * torch.randn(4, 4, 4, 4, dtype=torch.double)).sum()
        (gradient,) = torch.autograd.grad(y, x, create_graph=True)
        gradient.square().sum().backward()
        gradients.append(net[0].weight.grad)
    torch.testing.assert_close(*gradients)


def test_second_order_uses_the_gate_of_its_own_step():
    """The gate shuts and the statistics move between a forward pass and its second derivative."""
    layer = stepped(UBN(3, fct_warmup=0).double(), training=True)

    def penalty(in_between):
        norm = copy.deepcopy(layer)
        torch.manual_seed(0)
        x = (torch.randn(4, 3, 5, 5, dtype=torch.double) + 1).requires_grad_()
        y = norm(x)
        if in_between:
            norm.fct_momentum = 1.0
            norm(torch.randn(8, 3, 5, 5, dtype=torch.double))
            assert not norm.batch_statistics_used
        (gradient,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        gradient.square().sum().backward()
        return x.grad

    assert torch.equal(penalty(False), penalty(True))


def test_a_layer_called_twice_in_a_row_counts_each_gradient_once():
    layer = stepped(UBN(3).double())
    names = [name for name, _ in layer.named_parameters()]

    def function(x, *parameters):
        state = dict(zip(names, parameters))
        return functional_call(layer, state, (functional_call(layer, state, (x,)),))

    x = torch.randn(2, 3, 2, 2, dtype=torch.double, requires_grad=True)
    parameters = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradgradcheck(function, (x, *parameters), fast_mode=True)


def test_per_sample_gradients(make_layer):
    layer = stepped(make_layer(3).double())
    state, x = dict(layer.named_parameters()), torch.randn(5, 3, 4, 4, dtype=torch.double)

    def loss(state, image):
        return functional_call(layer, state, (image[None],)).pow(3).sum()

    found = vmap(grad(loss), (None, 0))(state, x)
    for i, image in enumerate(x):
        expected = torch.autograd.grad(loss(state, image), list(state.values()))
        for name, value in zip(state, expected):
            torch.testing.assert_close(found[name][i], value, msg=name)


def test_per_sample_gradients_in_training_say_what_to_do(make_layer):
    """The error was that of an operation inside, such as 'output with shape [] does not match'."""
    layer = stepped(make_layer(3), training=True)
    state, x = dict(layer.named_parameters()), torch.randn(5, 3, 4, 4)

    def loss(state, image):
        return functional_call(layer, state, (image[None],)).pow(3).sum()

    with pytest.raises(RuntimeError, match='replace_all_batch_norm_modules_'):
        vmap(grad(loss), (None, 0))(state, x)
    torch.func.replace_all_batch_norm_modules_(layer)
    found = vmap(grad(loss), (None, 0))(state, x)
    loss(state, x[1]).backward()
    for name, value in layer.named_parameters():
        torch.testing.assert_close(found[name][1], value.grad, msg=name)


def test_ensembles(make_layer):
    members = [stepped(make_layer(3)) for _ in range(3)]
    parameters, buffers = stack_module_state(members)
    x = torch.randn(4, 3, 5, 5)
    base = copy.deepcopy(members[0]).to('meta')
    found = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(found, torch.stack([member(x) for member in members]))


@pytest.mark.filterwarnings('ignore:There is a performance drop')
@pytest.mark.parametrize('differentiate', [False, True])
def test_ensembles_in_training(make_layer, differentiate):
    members = [stepped(make_layer(3)).train() for _ in range(3)]
    parameters, buffers = stack_module_state(members)
    x = torch.randn(4, 3, 5, 5)
    base = copy.deepcopy(members[0])

    def of_one(parameters, buffers):
        return functional_call(base, (parameters, buffers), (x,)).square().sum()

    found = vmap(grad(of_one) if differentiate else of_one)(parameters, buffers)
    losses = torch.stack([member(x).square().sum() for member in members])
    if differentiate:
        losses.sum().backward()
        for name, values in found.items():
            for value, member in zip(values, members):
                torch.testing.assert_close(value, member.get_parameter(name).grad)
    else:
        torch.testing.assert_close(found, losses)
    for name, values in buffers.items():
        for value, member in zip(values, members):
            torch.testing.assert_close(value, member.get_buffer(name), msg=name)


@pytest.mark.parametrize('interval', [1, 2])
def test_grad_of_training_steps(make_layer, interval):
    layer = stepped(make_layer(3)).train()
    if isinstance(layer, UBN):
        layer.fct_interval = interval
    twin = copy.deepcopy(layer)
    x = torch.randn(4, 3, 5, 5)
    upstream = torch.randn_like(x)

    def loss(parameters, buffers):
        y = functional_call(layer, (parameters, buffers), (x,))
        return (y * upstream).sum(), buffers

    parameters, buffers = dict(layer.named_parameters()), dict(layer.named_buffers())
    for _ in range(3):
        found, buffers = grad(loss, has_aux=True)(parameters, buffers)
        twin.zero_grad()
        (twin(x) * upstream).sum().backward()
        for name, value in twin.named_parameters():
            torch.testing.assert_close(found[name], value.grad, msg=name)
        for name, value in twin.named_buffers():
            torch.testing.assert_close(buffers[name], value, msg=name)


def test_forward_mode(make_layer):
    layer = stepped(make_layer(3).double())
    x, tangent = torch.randn(2, 2, 3, 4, 4, dtype=torch.double)
    rows = torch.autograd.functional.jacobian(layer, x).reshape(x.numel(), -1)
    expected = (rows @ tangent.flatten()).view_as(x)
    torch.testing.assert_close(jvp(layer, (x,), (tangent,))[1], expected)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent))).tangent
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.filterwarnings('ignore:There is a performance drop')
def test_batched_gradients(make_layer, training):
    layer = stepped(make_layer(3).double(), training)
    x = torch.randn(4, 3, 4, 4, dtype=torch.double, requires_grad=True)
    y = layer(x)
    inputs, upstream = [x, *layer.parameters()], torch.randn(3, *y.shape, dtype=torch.double)
    found = torch.autograd.grad(y, inputs, upstream, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(y, inputs, one, retain_graph=True) for one in upstream]
    for batched, single in zip(found, zip(*each)):
        torch.testing.assert_close(batched, torch.stack(single))


def test_training_without_statistics_under_vmap(make_layer):
    layer = torch.func.replace_all_batch_norm_modules_(stepped(make_layer(3), training=True))
    x = torch.randn(2, 5, 3, 4, 4)
    torch.testing.assert_close(vmap(layer)(x), torch.stack([layer(batch) for batch in x]))

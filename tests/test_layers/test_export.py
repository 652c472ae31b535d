"""torch.compile in training and evaluation, torch.export and ONNX in evaluation."""

import copy

import numpy as np
import pytest
import torch
from against_reference import randomize
from torch import nn
from torch._inductor import config as inductor_config

from mmubn.layers import UBN
from mmubn.ops import compiled as operators
from mmubn.ops.backend import CPP


def make_network(layer):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), layer(4), nn.ReLU(), nn.Conv2d(4, 4, 3), layer(4))
    randomize(net)
    return net


@pytest.fixture
def network(make_layer):
    return make_network(make_layer)


@pytest.mark.newer_torch('Dynamo does not follow a layer that writes to its buffers')
@pytest.mark.filterwarnings('ignore')
def test_compiled_training_equals_eager(network):
    """Outputs, gradients and buffers over steps in which gates open and shut, one graph."""
    torch._dynamo.reset()
    copied = copy.deepcopy(network)
    compiled = torch.compile(copied, fullgraph=True, backend='aot_eager')
    for step in range(4):
        x = torch.randn(4, 3, 10, 12) + step
        expected, actual = network(x), compiled(x)
        upstream = torch.randn_like(expected)
        expected.backward(upstream)
        actual.backward(upstream)
        torch.testing.assert_close(actual, expected)
    for (name, parameter), other in zip(network.named_parameters(), copied.parameters()):
        # Four steps are added up in another order.
        torch.testing.assert_close(other.grad, parameter.grad, rtol=1e-4, atol=3e-4, msg=name)
    for (name, buffer), other in zip(network.named_buffers(), copied.buffers()):
        torch.testing.assert_close(
            other, buffer, msg=lambda message, name=name: f'{name}: {message}'
        )
    network.eval()
    compiled.eval()
    torch.testing.assert_close(compiled(x), network(x))


@pytest.mark.newer_torch('a step is an operator of the graph from torch 2.4 on', than='2.3')
@pytest.mark.filterwarnings('ignore')
def test_inductor_hands_over_its_own_memory_format(monkeypatch):
    """Its convolutions are in channels_last on a CPU. Each norm cost four copies."""
    if CPP.why_not(torch.zeros(1, 1, 1, 1), 3):
        pytest.skip('Inductor needs a C++ compiler')
    torch._dynamo.reset()
    network = nn.Sequential(*make_network(UBN), nn.Conv2d(4, 4, 3))
    copied = copy.deepcopy(network)
    formats = []

    def recorded(name):
        function = getattr(operators, name)

        def call(*arguments):
            formats.extend(
                value.is_contiguous(memory_format=torch.channels_last)
                for value in arguments
                if isinstance(value, torch.Tensor) and value.dim() == 4
            )
            return function(*arguments)

        return call

    x = torch.randn(4, 3, 12, 14)
    expected, upstream = network(x), torch.randn(4, 4, 6, 8)
    expected.backward(upstream)
    for name in ('step_forward', 'step_backward'):
        monkeypatch.setattr(operators, name, recorded(name))
    # Graphs of an earlier run would hide a change. Trying the processor's vectors takes long.
    with inductor_config.patch({'fx_graph_cache': False, 'cpp.vec_isa_ok': False}):
        actual = torch.compile(copied, fullgraph=True)(x)
        actual.backward(upstream)
    assert formats == [True] * 6  # X twice, dY; of two norms
    torch.testing.assert_close(actual, expected)
    for (name, parameter), other in zip(network.named_parameters(), copied.parameters()):
        torch.testing.assert_close(other.grad, parameter.grad, rtol=1e-4, atol=1e-4, msg=name)
    for (name, buffer), other in zip(network.named_buffers(), copied.buffers()):
        torch.testing.assert_close(other, buffer, msg=name)


@pytest.mark.newer_torch('a step is an operator of the graph from torch 2.4 on')
@pytest.mark.parametrize('settings', [{}, dict(fct_interval=8), dict(fct=None)])
@pytest.mark.parametrize('calls', [1, 2])
def test_compiled_training_is_one_graph(settings, calls):
    """Over 20 steps, in which gates open and shut; a layer that is called twice included."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    norm = UBN(4, fct_warmup=0, fct_momentum=0.7, **settings)
    eager = copy.deepcopy(norm)

    def forward(norm, x):
        for _ in range(calls):
            x = norm(x)
        return x

    compiled = torch.compile(forward, fullgraph=True, backend=backend)
    for step in range(20):
        x = torch.randn(4, 4, 6, 6) + step % 3
        torch.testing.assert_close(compiled(norm, x), forward(eager, x))
    for (name, buffer), expected in zip(norm.named_buffers(), eager.buffers()):
        torch.testing.assert_close(buffer, expected, msg=name)
    assert norm.batch_statistics_used == eager.batch_statistics_used
    assert len(graphs) == 1


@pytest.mark.newer_torch('a step is an operator of the graph from torch 2.4 on')
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('training', [True, False], ids=['training', 'evaluation'])
@pytest.mark.parametrize('transform', ['jvp', 'grad', 'vmap'])
def test_compiled_transforms_equal_eager_ones(transform, training):
    """The operator knows none of them: a tangent was zero without a word."""
    torch._dynamo.reset()
    norm = UBN(4, fct=None, track_running_stats=not training).train(training)
    randomize(norm)
    x, t = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6)
    function = dict(
        jvp=lambda x, t: torch.func.jvp(norm, (x,), (t,))[1],
        grad=lambda x, t: torch.func.grad(lambda v: (norm(v) * t).sum())(x),
        vmap=lambda x, t: torch.func.vmap(norm)(torch.stack([x, t])),
    )[transform]
    compiled = torch.compile(function, backend='aot_eager')
    torch.testing.assert_close(compiled(x, t), function(x, t))


@pytest.fixture
def evaluated():
    """The network with UBN, in evaluation after a step, and an input."""
    net = make_network(UBN)
    net(torch.randn(8, 3, 10, 12))
    return net.eval(), torch.randn(2, 3, 10, 12)


@pytest.mark.newer_torch('torch.export takes the size of a batch for a constant', than='2.4')
def test_torch_export_with_dynamic_batch(evaluated):
    net, x = evaluated
    batch = torch.export.Dim('batch', min=2)
    program = torch.export.export(net, (x,), dynamic_shapes=({0: batch},))
    other = torch.randn(5, 3, 10, 12)
    torch.testing.assert_close(program.module()(other), net(other))


@pytest.mark.newer_torch('torch.export makes a graph that writes to buffers alone', than='2.6')
def test_torch_export_of_training_with_dynamic_sizes():
    """As for quantization-aware training: outputs, gradients and buffers for every size."""
    network = make_network(UBN)
    twin = copy.deepcopy(network)
    sizes = {0: torch.export.Dim('n', min=2)}
    sizes.update({axis: torch.export.Dim(name, min=8) for axis, name in ((2, 'h'), (3, 'w'))})
    program = torch.export.export(twin, (torch.randn(4, 3, 10, 12),), dynamic_shapes=(sizes,))
    exported = program.module()
    for shape in ((4, 3, 10, 12), (7, 3, 12, 9), (2, 3, 8, 15)):
        x = torch.randn(shape) + 1
        expected, actual = network(x), exported(x)
        upstream = torch.randn_like(expected)
        network.zero_grad()
        exported.zero_grad()
        expected.backward(upstream)
        actual.backward(upstream)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        gradients = dict(exported.named_parameters())
        for name, parameter in network.named_parameters():
            torch.testing.assert_close(
                gradients[name].grad, parameter.grad, rtol=1e-4, atol=1e-4, msg=name
            )
    buffers = dict(exported.named_buffers())
    for name, buffer in network.named_buffers():
        torch.testing.assert_close(buffers[name], buffer, msg=name)


@pytest.mark.newer_torch(
    'no dynamo=, and its tracer drops a padding that was computed from a shape'
)
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('dynamo', [True, False], ids=['dynamo', 'torchscript'])
def test_onnx(evaluated, dynamo, tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime')
    net, x = evaluated
    path = tmp_path / 'net.onnx'
    torch.onnx.export(net, (x,), path, dynamo=dynamo)
    session = onnxruntime.InferenceSession(path)
    (actual,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(actual, net(x).detach().numpy(), rtol=1e-4, atol=1e-4)

"""What only a GPU can show of the kernels."""

import copy

import pytest
import torch
from torch import nn
from weights import assert_same_state

from mmubn.layers import UBN
from mmubn.ops import Buffers, Parameters, Settings, mean_cosine_similarity
from mmubn.ops.backend import TORCH, TRITON

pytest.importorskip('triton', minversion='3.3')
pytest.importorskip('mmubn.ops.triton_kernels', exc_type=ImportError)
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU')


@pytest.fixture(autouse=True)
def _no_tf32(monkeypatch):
    """Torch's convolutions, which some of these tests compare with, would round to 10 bits."""
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)


def step(layer, x, upstream):
    """Output and gradients of one training step."""
    x.grad = None
    layer.zero_grad()
    y = layer(x)
    y.backward(upstream)
    return [y, x.grad, *(parameter.grad for parameter in layer.parameters())]


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('shape', [(32, 64, 56, 56), (16, 512, 7, 7), (2, 256, 100, 152)])
def test_layer_equals_that_in_torch(shape, layout, dtype):
    x = torch.randn(shape, device='cuda').to(dtype).contiguous(memory_format=layout) + 1
    upstream = torch.randn_like(x)
    results = []
    for backend in ('torch', 'triton'):
        layer = UBN(shape[1], backend=backend).cuda()
        results.append(step(layer, x.clone().requires_grad_(), upstream))
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-3
    for by_torch, by_triton in zip(*results):
        difference = (by_triton - by_torch).abs().max() / by_torch.abs().max()
        assert difference <= tolerance


def test_a_step_has_the_same_bits_every_time():
    layer = UBN(64).cuda()
    x = torch.randn(16, 64, 28, 28, device='cuda', requires_grad=True)
    upstream = torch.randn_like(x)
    steps = [step(copy.deepcopy(layer), x, upstream) for _ in range(2)]
    assert all(map(torch.equal, *steps))


def test_no_step_waits_for_the_device():
    layer = UBN(8, fct_warmup=0).cuda()
    x = torch.randn(4, 8, 9, 9, device='cuda', requires_grad=True)
    upstream = torch.randn_like(x)
    step(layer, x, upstream)
    torch.cuda.set_sync_debug_mode('error')
    try:
        step(layer, x, upstream)
    finally:
        torch.cuda.set_sync_debug_mode('default')


def test_step_in_a_cuda_graph():
    """Replayed, it does what the eager step does, the running statistics included."""
    torch.manual_seed(0)
    captured, eager = UBN(8).cuda(), UBN(8).cuda()
    x = torch.randn(4, 8, 9, 9, device='cuda', requires_grad=True)
    upstream = torch.randn_like(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(captured, x, upstream)
            step(eager, x, upstream)
    torch.cuda.current_stream().wait_stream(stream)
    captured.zero_grad(set_to_none=True)
    x.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = captured(x)
        y.backward(upstream)
    with torch.no_grad():
        x.normal_()
    graph.replay()
    torch.testing.assert_close(y, step(eager, x, upstream)[0])
    assert_same_state(captured, eager, rtol=1e-5, atol=1e-6)


def test_more_than_31_bits_of_elements():
    """2.2 billion elements, 4.3 GB in half precision; all images are the same."""
    shape = (33, 64, 1024, 1024)
    x = torch.randn(1, *shape[1:], device='cuda', dtype=torch.bfloat16).expand(shape).contiguous()
    parameters = Parameters(
        weight=torch.randn(64, device='cuda'), kernel=torch.randn(64, 1, 3, 3, device='cuda')
    )
    settings = Settings(update=False)
    image_mean, row = TRITON.measure(x, None, 1)
    torch.testing.assert_close(row[2].item(), 1.0, rtol=1e-4, atol=0)
    last = TORCH.measure(x[-1:], None, 0)
    torch.testing.assert_close(image_mean[-1:], last[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(row[3:], last[1][3:], rtol=1e-4, atol=1e-4)

    known = row[None], parameters, Buffers(), settings
    y, _, statistics = TRITON.normalize(x, image_mean, *known)
    expected = TORCH.normalize(x[-1:], image_mean[-1:], *known)[0]
    torch.testing.assert_close(y[-1:], expected, rtol=2e-2, atol=2e-2)
    del y
    sums = TRITON.backward_sums(x, x, image_mean, statistics, parameters, settings)
    known = statistics, sums.d_statistics, parameters, settings, sums
    dx = TRITON.backward_input(x, *known)[0]
    assert torch.equal(dx[-1], dx[0])


def small_network():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), UBN(8), nn.ReLU(), nn.Conv2d(8, 4, 3), UBN(4)
    return nn.Sequential(*layers).cuda()


def test_autocast_network_trains():
    net = small_network()
    with torch.autocast('cuda', dtype=torch.bfloat16):
        loss = net(torch.randn(4, 3, 16, 16, device='cuda')).square().mean()
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())


def test_compiled_network_equals_the_eager_one():
    eager = small_network()
    compiled = torch.compile(small_network())
    x = torch.randn(4, 3, 16, 16, device='cuda')
    for _ in range(2):
        losses = [network(x).square().mean() for network in (eager, compiled)]
        torch.testing.assert_close(*losses)
        for loss in losses:
            loss.backward()
    for wanted, got in zip(eager.parameters(), compiled.parameters()):
        torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-3, atol=1e-4)
    for wanted, got in zip(eager.buffers(), compiled.buffers()):
        torch.testing.assert_close(got, wanted)


def test_float16_training_with_a_gradient_scaler():
    """A step whose scaled gradients overflow leaves the parameters; every other one moves them."""
    network = small_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler('cuda', init_scale=2.0**40)
    x, losses, skipped = torch.randn(4, 3, 16, 16, device='cuda'), [], 0
    for _ in range(60):
        before = [parameter.detach().clone() for parameter in network.parameters()]
        with torch.autocast('cuda', dtype=torch.float16):
            loss = (network(x) - 1).square().mean()
        optimizer.zero_grad()
        scale = scaler.get_scale()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        same = all(map(torch.equal, before, network.parameters()))
        assert same == (scaler.get_scale() < scale)
        skipped += same
        losses.append(loss.item())
    assert 0 < skipped < 40
    assert losses[-1] < 0.8 * losses[0]


def test_autocast_leaves_the_similarity_in_full_precision():
    """Half precision would overflow at 1e5, and round at the size of a threshold."""
    x = 1e5 + 1e4 * torch.randn(4, 8, 9, 9, device='cuda')
    expected = mean_cosine_similarity(x, backend='torch')
    with torch.autocast('cuda', dtype=torch.float16):
        torch.testing.assert_close(mean_cosine_similarity(x, backend='torch'), expected)

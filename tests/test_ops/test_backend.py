"""Which backend is chosen, and what an explicit choice that cannot be met says."""

import logging
from types import SimpleNamespace

import pytest
import torch
from against_reference import LAYERS, Reference, assert_equals_reference, randomize
from torch.utils.flop_counter import FlopCounterMode

from mmubn.layers import UBN
from mmubn.ops import backend, mean_cosine_similarity, triton_backend
from mmubn.ops.backend import CPP, TORCH, TRITON

triton = pytest.importorskip('triton')


@pytest.mark.usefixtures('on_kernel_device')
@pytest.mark.parametrize('name', ['ubn', 'ubn_center', 'ubn_gate', 'bnet', 'iebn'])
def test_layer_with_triton_equals_reference(name):
    layer = LAYERS[name](3, backend='triton').double()
    if hasattr(layer, 'fct_momentum'):
        layer.fct_momentum = 0.9
    randomize(layer)
    oracle = Reference(layer)
    for offset in (2, 0, 3):  # gate open, shut, open
        x = torch.randn(3, 3, 4, 5, dtype=torch.double) + offset
        assert_equals_reference(layer, oracle, x, rtol=1e-9, atol=1e-10)
    layer.eval()
    assert_equals_reference(layer, oracle, x, rtol=1e-9, atol=1e-10)


@pytest.mark.usefixtures('on_kernel_device')
def test_similarity_with_triton():
    x = torch.randn(5, 3, 4, 7, dtype=torch.double) + 1
    expected = mean_cosine_similarity(x, backend='torch')
    torch.testing.assert_close(mean_cosine_similarity(x, backend='triton'), expected)


@pytest.mark.usefixtures('on_kernel_device')
@pytest.mark.parametrize('name', ['torch', 'cpp', 'triton'])
def test_parameters_and_buffers_that_are_views(name, kernel_device):
    """As functional_call gives those of one of several models, stacked behind the channels."""
    if name == 'cpp' and (kernel_device != 'cpu' or CPP.why_not(torch.zeros(1, 3, 1, 1), 3)):
        pytest.skip('no C++ here')
    layer, plain = UBN(3, backend=name), UBN(3, backend='torch')
    randomize(layer)
    plain.load_state_dict(layer.state_dict())
    stacked = {key: torch.stack([value] * 2, -1) for key, value in layer.state_dict().items()}
    views = {key: value[..., 0] for key, value in stacked.items()}
    names = [key for key, _ in layer.named_parameters()]
    leaves = [views[key].requires_grad_() for key in names]
    x = torch.randn(4, 3, 5, 6)
    y, expected = torch.func.functional_call(layer, views, x), plain(x)
    torch.testing.assert_close(y, expected)
    upstream = torch.randn_like(x)
    gradients = torch.autograd.grad(y, leaves, upstream)
    for key, gradient, other in zip(
        names, gradients, torch.autograd.grad(expected, [*plain.parameters()], upstream)
    ):
        torch.testing.assert_close(gradient, other, msg=key)
    for key, buffer in plain.named_buffers():
        torch.testing.assert_close(stacked[key][..., 0], buffer, msg=key)
        if buffer.dim():  # nothing beside them has moved
            torch.testing.assert_close(stacked[key][..., 1], layer.state_dict()[key], msg=key)


@pytest.mark.parametrize(
    ('x', 'kernel_size', 'reason'),
    [
        (torch.zeros(2, 3, 4, 4, dtype=torch.float16), 3, 'it has no kernels for float16'),
        (torch.zeros(2, 3, 4, 4), 9, 'its kernels have kernel_size 1, 3, 5, 7, not 9'),
    ],
)
def test_auto_on_the_cpu(x, kernel_size, reason, caplog):
    """The compiled C++ where there is a compiler and it has kernels, else torch."""
    x = x.cpu()
    compiled = not CPP.why_not(torch.zeros(1, 3, 1, 1), 3)
    assert backend.choose('auto', torch.zeros(2, 3, 4, 4)) is (CPP if compiled else TORCH)
    backend._say_once.cache_clear()
    assert backend.choose('auto', x, kernel_size) is TORCH
    assert reason in caplog.text
    assert backend.choose('auto', x[:0], kernel_size) is TORCH


def test_torch_serves_where_operations_are_watched():
    """Counters of FLOPs and fake tensors have to see torch's own operations."""
    with FlopCounterMode(display=False):
        assert backend.choose('auto', torch.zeros(2, 3, 4, 4)) is TORCH


def test_a_device_that_is_not_here_is_described(monkeypatch):
    monkeypatch.setitem(backend._BY_DEVICE, 'xpu', TORCH)
    assert backend.describe()[-1] == ('torch', False, 'there is no xpu')


def test_triton_on_the_cpu_is_refused(monkeypatch):
    monkeypatch.setenv('TRITON_INTERPRET', '0')
    layer = UBN(3, backend='triton')
    with pytest.raises(RuntimeError, match='input is on cpu, not on a GPU'):
        layer(torch.randn(2, 3, 4, 4))


@pytest.mark.usefixtures('on_kernel_device')
def test_wide_kernel_with_triton_is_refused():
    layer = UBN(3, backend='triton', kernel_size=9)
    with pytest.raises(RuntimeError, match='have kernel_size 1, 3, 5, 7, not 9'):
        layer(torch.randn(2, 3, 12, 12))


def test_unknown_backend():
    with pytest.raises(ValueError, match="must be one of auto, torch, cpp, triton, got 'cuda'"):
        UBN(3, backend='cuda')
    with pytest.raises(ValueError, match="must be one of auto, torch, cpp, triton, got 'cuda'"):
        mean_cosine_similarity(torch.randn(2, 3), backend='cuda')


class OnGpu:
    """What the choice looks at of a tensor on a GPU."""

    is_cuda = True
    device = torch.device('cuda:0')

    def numel(self):
        return 1


@pytest.fixture
def gpu(monkeypatch, kernel_device):
    """As if there were one with compute capability 9.0 and a driver that Triton can use."""
    triton_backend._why_no_launch.cache_clear()
    backend._say_once.cache_clear()
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
    monkeypatch.setattr(torch.version, 'hip', None)
    driver = SimpleNamespace(active=SimpleNamespace(get_current_device=lambda: 0))
    monkeypatch.setattr(triton.runtime, 'driver', driver)
    yield driver
    triton_backend._why_no_launch.cache_clear()


@pytest.mark.usefixtures('gpu')
def test_auto_takes_triton_on_a_gpu():
    assert backend.choose('auto', OnGpu(), 3) is TRITON


@pytest.mark.usefixtures('gpu')
def test_auto_is_torch_where_triton_is_too_old(monkeypatch, caplog):
    monkeypatch.setattr(triton, '__version__', '3.1.0')
    with caplog.at_level(logging.WARNING, logger='mmubn'):
        assert backend.choose('auto', OnGpu(), 3) is TORCH
    assert 'its kernels need triton 3.3, found 3.1.0' in caplog.text
    with pytest.raises(RuntimeError, match=r'need triton 3\.3, found 3\.1\.0'):
        backend.choose('triton', OnGpu(), 3)


@pytest.mark.usefixtures('gpu')
def test_auto_is_torch_on_an_old_gpu(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (7, 5))
    with caplog.at_level(logging.WARNING, logger='mmubn'):
        assert backend.choose('auto', OnGpu(), 3) is TORCH
    assert 'cuda:0 is older than compute capability 8.0' in caplog.text


def test_auto_is_torch_where_triton_cannot_start(gpu, caplog):
    def fail():
        raise RuntimeError('Failed to find C compiler')

    gpu.active.get_current_device = fail
    with caplog.at_level(logging.WARNING, logger='mmubn'):
        assert backend.choose('auto', OnGpu(), 3) is TORCH
    assert 'triton cannot start: Failed to find C compiler' in caplog.text


def test_auto_falls_back_and_says_so_once(caplog):
    backend._say_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger='mmubn'):
        assert backend.choose('auto', OnGpu(), 9) is TORCH
        assert backend.choose('auto', OnGpu(), 9) is TORCH
    assert len(caplog.records) == 1
    assert 'kernel_size 1, 3, 5, 7, not 9' in caplog.text

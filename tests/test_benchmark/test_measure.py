"""Time and memory are those of the steps."""

from types import SimpleNamespace

import torch
from torch import nn
from torch.autograd import DeviceType

from mmubn.benchmark import measure


def test_the_norms_take_turns():
    order = []

    class Clock:
        def laps(self, step):
            order.append(step)
            return {'forward': len(order)}

    laps = measure.race(dict(a='a', b='b', c='c'), Clock(), 2, 1, lambda text: None)
    assert ''.join(order) == 'cababcbca'
    assert laps['a'] == [{'forward': 4}, {'forward': 9}]


def test_saved_bytes_are_those_of_distinct_storages():
    class KeepsAttribute(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.hidden = torch.zeros(100)
            ctx.save_for_backward(x, x[:5], x.view(2, 5))
            return x * 1

        @staticmethod
        def backward(ctx, dy):
            return dy

    x = torch.randn(10, requires_grad=True)
    saved_bytes = measure.saved_bytes
    assert saved_bytes(lambda: KeepsAttribute.apply(x), nn.Identity()) == 4 * (10 + 100)
    linear = nn.Linear(10, 7)
    # The weight is a parameter; the output of tanh is kept.
    assert saved_bytes(lambda: linear(x).tanh(), linear) == 4 * (10 + 7)


def test_spans_on_the_device_are_no_launches(monkeypatch):
    """torch.compile names what it calls, and the profiler shows that beside the kernels."""

    def event(name, device_type=DeviceType.CUDA, **more):
        elapsed = SimpleNamespace(elapsed_us=lambda: 2.0)
        return SimpleNamespace(name=name, device_type=device_type, time_range=elapsed, **more)

    events = [
        event('moments', is_user_annotation=False),
        event('moments'),  # torch 2.1
        event('## Call CompiledFxGraph ##', is_user_annotation=True),
        event('aten::empty', DeviceType.CPU, is_user_annotation=False),
    ]
    monkeypatch.setattr(measure, '_profile', lambda step, device: events)
    monkeypatch.setattr(torch, 'empty', lambda *arguments, **keywords: torch.zeros(1))
    device = torch.device('cuda')
    assert measure.launches(None, device) == 2
    assert measure.kernel_us(None, device) == {'moments': 4.0}

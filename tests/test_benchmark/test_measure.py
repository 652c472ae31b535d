"""Time and memory are those of the steps."""

import torch
from torch import nn

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

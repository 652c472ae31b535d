"""BatchNorm and a layer with the same outputs, side by side."""

import torch
from torch import nn
from weights import trained

from mmubn import layers

CHANNELS = 4


def pair(kind, own=None, **settings):
    """BatchNorm with nothing at its initial value, and the layer with the same outputs.

    ``own`` are settings of the layer alone.
    """
    batch_norm = trained(nn.BatchNorm2d(CHANNELS, **settings)).train()
    batch_norm.num_batches_tracked.fill_(3)
    layer = getattr(layers, kind)(CHANNELS, **(own or {}), **settings)
    layer.load_state_dict(batch_norm.state_dict())
    return batch_norm, layer


def assert_same_steps(batch_norm, layer, dtype=torch.float32, steps=3, shape=(5, CHANNELS, 6, 7)):
    """Training steps, then an evaluation: outputs, all gradients and buffers."""
    buffers = dict(batch_norm.named_buffers())
    for step in range(steps + 1):
        for norm in (batch_norm, layer):
            if step == steps:
                norm.eval()
        x = torch.randn(shape, dtype=dtype) + 2
        inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
        expected, actual = batch_norm(inputs[0]), layer(inputs[1])
        torch.testing.assert_close(actual, expected)
        upstream = torch.randn_like(x)
        expected.backward(upstream)
        actual.backward(upstream)
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
        for name in buffers:
            torch.testing.assert_close(getattr(layer, name), getattr(batch_norm, name), msg=name)
    for name in ('weight', 'bias'):
        actual, expected = getattr(layer, name), getattr(batch_norm, name)
        if expected is not None and expected.grad is not None:
            # As gradients of log(weight), which the division by the sigmoid leaves alone.
            torch.testing.assert_close(
                actual * actual.grad, expected * expected.grad, rtol=1e-4, atol=1e-4
            )

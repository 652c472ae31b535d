"""Deformable convolution, v1 and v2, against its definition."""

import sys

import formulas
import pytest
import torch
from mmcv.ops import (
    DeformConv2dPack,
    ModulatedDeformConv2dPack,
    deform_conv2d,
    modulated_deform_conv2d,
)
from torch.autograd import gradcheck

# stride, padding, dilation (each over rows and columns), groups, groups of offsets
SETTINGS = {
    'plain': ((1, 1), (1, 1), (1, 1), 1, 1),
    'uneven': ((2, 1), (0, 2), (1, 2), 2, 4),
}


def draw(stride, padding, dilation, groups, deform_groups, dtype=torch.float64, scale=2.0):
    """x, offset, mask, weight, bias for a kernel of 3 × 2."""
    kernel, size = (3, 2), (7, 8)
    out = [
        (size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i in range(2)
    ]
    return (
        torch.randn(2, 4, *size, dtype=dtype, requires_grad=True),
        torch.randn(2, deform_groups * 12, *out, dtype=dtype).mul(scale).requires_grad_(),
        torch.rand(2, deform_groups * 6, *out, dtype=dtype, requires_grad=True),
        torch.randn(6, 4 // groups, *kernel, dtype=dtype, requires_grad=True),
        torch.randn(6, dtype=dtype, requires_grad=True),
    )


@pytest.mark.parametrize('with_bias', [True, False])
@pytest.mark.parametrize('name', SETTINGS)
def test_modulated(name, with_bias):
    x, offset, mask, weight, bias = draw(*SETTINGS[name])
    bias = bias if with_bias else None
    y = modulated_deform_conv2d(x, offset, mask, weight, bias, *SETTINGS[name])
    torch.testing.assert_close(
        y, formulas.deform_conv(x, offset, mask, weight, bias, *SETTINGS[name])
    )


@pytest.mark.parametrize('name', SETTINGS)
def test_first_version(name):
    x, offset, mask, weight, _ = draw(*SETTINGS[name])
    y = deform_conv2d(x, offset, weight, *SETTINGS[name])
    mask = torch.ones_like(mask)
    torch.testing.assert_close(
        y, formulas.deform_conv(x, offset, mask, weight, None, *SETTINGS[name])
    )


@pytest.mark.parametrize('name', SETTINGS)
def test_gradients(name):
    """Of every input, each alone as well: mmcv asks for them in two calls."""
    x, offset, mask, weight, bias = draw(*SETTINGS[name])
    settings = SETTINGS[name]
    inputs = (x, offset, mask, weight, bias)
    assert gradcheck(lambda *a: modulated_deform_conv2d(*a, *settings), inputs, fast_mode=True)
    assert gradcheck(
        lambda x, o, m, w: modulated_deform_conv2d(x, o, m, w, None, *settings),
        inputs[:4],
        fast_mode=True,
    )

    def first(x, offset, weight):
        return deform_conv2d(x, offset, weight, *settings)

    assert gradcheck(first, (x, offset, weight), fast_mode=True)
    constants = [t.detach() for t in (x, offset, weight)]
    for i, value in enumerate((x, offset, weight)):
        alone = (*constants[:i], value, *constants[i + 1 :])
        assert gradcheck(first, alone, fast_mode=True)


@pytest.mark.parametrize('name', SETTINGS)
def test_offsets_of_0_have_no_gradient_one_pixel_outside(name):
    """As in mmcv, where a layer starts with such offsets; within, it is that of a tiny one."""
    stride, padding, dilation, _, groups = SETTINGS[name]
    x, offset, mask, weight, bias = draw(*SETTINGS[name], scale=0.0)
    places = []
    for axis in range(2):  # of the samples that do not move
        taps = torch.arange(weight.shape[2 + axis])[:, None] * dilation[axis]
        places.append(taps + torch.arange(offset.shape[2 + axis]) * stride[axis] - padding[axis])
    y, x_place = places[0][:, None, :, None], places[1][None, :, None]
    outside = torch.stack(torch.broadcast_tensors(y == -1, x_place == -1), 2)
    split = (2, groups, *outside.shape)
    assert outside.any()
    for function in (
        lambda o: modulated_deform_conv2d(x, o, mask, weight, bias, *SETTINGS[name]),
        lambda o: deform_conv2d(x, o, weight, *SETTINGS[name]),
    ):
        output = function(offset)
        upstream = torch.randn_like(output)
        (gradient,) = torch.autograd.grad(output, offset, upstream)
        beside = (offset.detach() + 1e-9).requires_grad_()
        (expected,) = torch.autograd.grad(function(beside), beside, upstream)
        expected = expected.view(split).masked_fill(outside, 0)
        torch.testing.assert_close(gradient.view(split), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('name', SETTINGS)
def test_an_offset_that_is_nan_reads_nothing(name):
    x, offset, mask, weight, bias = draw(*SETTINGS[name])
    offset = offset.detach()
    offset[0, 3, 1, 2] = float('nan')
    far = offset.nan_to_num(nan=1e6)
    for function in (
        lambda o: modulated_deform_conv2d(x, o, mask, weight, bias, *SETTINGS[name]),
        lambda o: deform_conv2d(x, o, weight, *SETTINGS[name]),
    ):
        assert torch.equal(function(offset), function(far))


@pytest.mark.parametrize('scale', [0.0, 1.0, 2.0])
@pytest.mark.parametrize('name', SETTINGS)
def test_equals_the_compiled_one(compiled, ext, name, scale, monkeypatch):
    x, offset, mask, weight, bias = draw(*SETTINGS[name], dtype=torch.float32, scale=scale)
    if scale == 1:  # whole pixels, also exactly one outside
        offset = offset.detach().round().requires_grad_()
    settings = SETTINGS[name]
    results = []
    for module in (compiled, ext):
        for user in ('deform_conv', 'modulated_deform_conv'):
            monkeypatch.setattr(sys.modules[f'mmcv.ops.{user}'], 'ext_module', module)
        first = deform_conv2d(x, offset, weight, *settings)
        second = modulated_deform_conv2d(x, offset, mask, weight, bias, *settings)
        gradients = torch.autograd.grad(first.cos().sum(), (x, offset, weight))
        gradients += torch.autograd.grad(second.cos().sum(), (x, offset, mask, weight, bias))
        results.append((first, second, *gradients))
    for expected, actual in zip(*results):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('pack', [DeformConv2dPack, ModulatedDeformConv2dPack])
def test_layers_under_autocast_and_in_channels_last(pack):
    layer = pack(4, 6, 3, padding=1, bias=False)
    torch.nn.init.normal_(layer.conv_offset.weight, std=0.2)
    x = torch.randn(2, 4, 9, 8)
    expected = layer(x)
    torch.testing.assert_close(layer(x.to(memory_format=torch.channels_last)), expected)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        y = layer(x)
        y.backward(torch.randn_like(y))
    assert y.dtype == torch.bfloat16  # that of the offsets, which a convolution made
    assert (y - expected).abs().max() < 0.1 * expected.abs().max()
    assert all(p.grad.any() and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize('pack', [DeformConv2dPack, ModulatedDeformConv2dPack])
def test_compiled_training_keeps_the_gradients(pack):
    torch._dynamo.reset()
    layer = pack(4, 6, 3, padding=1, bias=False)
    torch.nn.init.normal_(layer.conv_offset.weight, std=0.2)
    x = torch.randn(2, 4, 9, 8)
    upstream = torch.randn(2, 6, 9, 8)
    results = []
    for function in (layer, torch.compile(layer, backend='aot_eager')):
        layer.zero_grad()
        y = function(x)
        y.backward(upstream)
        results.append([y.detach(), *(p.grad.clone() for p in layer.parameters())])
    for expected, actual in zip(*results):
        assert expected.any()
        torch.testing.assert_close(actual, expected)

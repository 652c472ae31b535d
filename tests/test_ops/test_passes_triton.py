"""The Triton kernels beside the torch passes, in the interpreter where there is no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmubn.ops import passes_torch

passes_triton = pytest.importorskip('mmubn.ops.passes_triton', exc_type=ImportError)

pytestmark = pytest.mark.usefixtures('on_kernel_device')

# Maps of one pixel, one image, one channel; more channels, columns or rows than a block.
SHAPES = [(2, 3, 5, 7), (3, 5, 1, 1), (1, 2, 53, 3), (4, 1, 3, 130), (2, 70, 4, 4)]
# With 1 a program takes all images and rows, with 1024 as few as it may.
PROGRAMS = [1, 1024]


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """``torch.empty`` is full of NaN: what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=PROGRAMS, ids='programs{}'.format)
def passes(request, monkeypatch):
    """The kernels, with many tiles and with one."""
    monkeypatch.setattr(passes_triton, '_ENOUGH_PROGRAMS', request.param)
    return passes_triton


def inputs(shape, kernel_size, layout, dtype=torch.float64):
    """X, dY, coefficients and taps; a mean of 30 shows what cancels."""
    batch, channels = shape[:2]
    x = (torch.randn(shape) + 30).to(dtype)
    dy = torch.randn(shape).to(dtype)
    if layout == 'channels_last':
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == 'strided':
        x = torch.stack([x, torch.zeros_like(x)], -1).flatten(3)[..., ::2]
    wide = torch.promote_types(dtype, torch.float32)
    shift, scale, slope, level = torch.randn(4, batch, channels, dtype=wide)
    taps = torch.randn(channels, kernel_size, kernel_size, dtype=wide)
    return x, dy, shift - 30, scale, slope, level, taps, torch.randn(channels, dtype=wide)


@pytest.mark.parametrize('layout', ['contiguous', 'channels_last', 'strided'])
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_moments_and_similarity(passes, shape, layout):
    x = inputs(shape, 1, layout)[0]
    torch.testing.assert_close(passes.image_moments(x), passes_torch.image_moments(x))
    torch.testing.assert_close(passes.image_mean(x), passes_torch.image_mean(x))
    weight = torch.randn(shape[0], dtype=torch.float64)
    expected = passes_torch.squared_sum(x, weight)
    torch.testing.assert_close(passes.squared_sum(x, weight), expected)
    torch.testing.assert_close(passes.squared_sum(x.flatten(1), weight), expected)


@pytest.mark.parametrize(
    'x',
    [torch.randn(3, 6, 5).transpose(1, 2).unsqueeze(-1), torch.randn(2, 3, 1, 9).mT],
    ids=['tokens', 'strip'],
)
def test_moments_of_planes_one_pixel_wide(passes, x):
    """The stride of a dimension of size 1 may be anything."""
    torch.testing.assert_close(passes.image_moments(x), passes_torch.image_moments(x))


@pytest.mark.parametrize(
    ('shape', 'kernel_size', 'layout'),
    [(shape, 3, layout) for shape in SHAPES for layout in ('contiguous', 'channels_last')]
    + [((2, 3, 18, 5), 1, 'channels_last'), ((2, 3, 5, 7), 1, 'contiguous')]
    + [((2, 3, 5, 7), 5, 'contiguous'), ((2, 2, 3, 4), 7, 'channels_last')]
    + [((2, 3, 5, 7), 3, 'strided')],
    ids=str,
)
def test_forward_and_backward(passes, shape, kernel_size, layout):
    x, dy, shift, scale, slope, level, taps, bias = inputs(shape, kernel_size, layout)
    y = passes.forward(x, shift, scale, taps, bias)
    assert y.stride() == torch.empty_like(x).stride()
    torch.testing.assert_close(y, passes_torch.forward(x, shift, scale, taps, bias))
    no_bias = passes_torch.forward(x, shift, scale, taps, None)
    torch.testing.assert_close(passes.forward(x, shift, scale, taps, None), no_bias)

    expected = passes_torch.backward_sums(x, dy, shift, scale, taps)
    actual = passes.backward_sums(x, dy, shift, scale, taps)
    for name in ('d_scale', 'd_shift', 'd_taps', 'd_bias'):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), msg=name)
    assert actual.d_x_r is None  # nothing of X's size is kept

    mean = passes_torch.image_mean(x)
    rest = mean, scale, slope, level, taps
    dx = passes.backward_input(x, dy, *rest, None)
    torch.testing.assert_close(dx, passes_torch.backward_input(x, dy, *rest, expected.d_x_r))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_torch(passes, dtype, kernel_device):
    """Both beside float64 on the same rounded input."""
    if dtype == torch.bfloat16 and kernel_device == 'cpu':
        pytest.skip('the interpreter cuts off to bfloat16 where a GPU rounds')
    x, dy, *rest = inputs((2, 3, 9, 11), 3, 'contiguous', dtype)

    def run(passes, x, dy, coefficients):
        shift, scale, slope, level, taps, bias = coefficients
        y = passes.forward(x, shift, scale, taps, bias)
        sums = passes.backward_sums(x, dy, shift, scale, taps)
        mean = passes.image_mean(x)
        dx = passes.backward_input(x, dy, mean, scale, slope, level, taps, sums.d_x_r)
        return [y, *passes.image_moments(x), *sums[:4], dx]

    oracle = run(passes_torch, x.double(), dy.double(), [value.double() for value in rest])
    eager, kernels = run(passes_torch, x, dy, rest), run(passes, x, dy, rest)
    for expected, by_torch, by_triton in zip(oracle, eager, kernels):
        assert by_triton.dtype == by_torch.dtype
        allowed = 2 * (by_torch - expected).abs().max() + 1e-6 * expected.abs().max()
        assert (by_triton - expected).abs().max() <= allowed


def compile_all(*arguments):
    script = Path(__file__).with_name('compile_kernels.py')
    output = subprocess.run(
        [sys.executable, script, *arguments],
        env={**os.environ, 'TRITON_INTERPRET': '0'},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert output.returncode == 0, output.stderr[-2000:]
    return [json.loads(line) for line in output.stdout.splitlines()]


def test_kernels_compile_without_spilling():
    """For an H100's architecture, without one; half precision, k = 3, both layouts."""
    compiled = compile_all('90', 'bfloat16', '3')
    assert len(compiled) == 10
    for kernel in compiled:
        assert kernel['stack_bytes'] <= 16, kernel
        assert kernel['registers'] <= 168, kernel


@pytest.mark.slow
@pytest.mark.parametrize('architecture', ['80', '90'])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float64'])
def test_every_kernel_compiles(architecture, dtype):
    assert len(compile_all(architecture, dtype, '1', '3', '5', '7')) == 4 * 10

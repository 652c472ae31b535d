"""The fused backend beside the plain one, in Triton's interpreter where there is no GPU."""

import sys

import pytest
import torch
from one_step import CALIBRATION, assert_same, copy, random_buffers, random_parameters, run_step
from torch.utils._python_dispatch import TorchDispatchMode

from mmubn import layers
from mmubn.layers import UBN, SyncUBN
from mmubn.ops import Buffers, Parameters, Settings, reference, triton_backend
from mmubn.ops.backend import TORCH, TRITON
from mmubn.ops.triton_backend import Tiles

pytest.importorskip('triton', minversion='3.3')
kernels = pytest.importorskip('mmubn.ops.triton_kernels', exc_type=ImportError)

pytestmark = pytest.mark.usefixtures('on_kernel_device')

# Maps of one pixel, one image, one channel; more channels, columns or rows than a block.
SHAPES = [(2, 3, 5, 7), (3, 5, 1, 1), (1, 2, 30, 3), (2, 1, 3, 130), (1, 70, 2, 4)]
LAYOUTS = ['contiguous', 'channels_last', 'strided']


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """``torch.empty`` is full of NaN: what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[1, 1024], ids='programs{}'.format)
def _programs(request, monkeypatch):
    """With 1 a program takes all images, channels and rows, with 1024 as few as it may.

    And then it reads ahead, also beyond the few rows that it has.
    """
    tiles = Tiles(programs=request.param, ahead=0 if request.param == 1 else 2)
    monkeypatch.setattr(TRITON, 'tiles', tiles)
    monkeypatch.setattr(triton_backend, '_ENOUGH_PROGRAMS', request.param)
    triton_backend._split_pixels.cache_clear()
    yield
    triton_backend._split_pixels.cache_clear()


def arrange(x, layout):
    """The same values in another order of the memory."""
    if layout == 'channels_last':
        return x.contiguous(memory_format=torch.channels_last)
    if layout == 'strided':
        return torch.stack([x, torch.zeros_like(x)], -1).flatten(3)[..., ::2]
    if layout == 'transposed':
        return x.mT.contiguous().mT
    return x


def random_input(shape, layout='contiguous', dtype=torch.float64):
    """A mean of 30 shows what cancels."""
    return arrange((torch.randn(shape) + 30).to(dtype), layout)


@pytest.mark.usefixtures('_programs')
@pytest.mark.parametrize('layout', [*LAYOUTS, 'transposed'])
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_measure(shape, layout):
    x = random_input(shape, layout)
    center_weight = torch.randn(shape[1], dtype=torch.float64)
    for stride in (1, 2):
        expected = TORCH.measure(x, center_weight, stride)
        assert_same(TRITON.measure(x, center_weight, stride), expected)
    assert_same(TRITON.measure(x, None, 0), TORCH.measure(x, None, 0))


def test_measure_of_more_images_than_a_block():
    """At random signs the similarity is near 0; an image of zeros counts."""
    x = random_input((70, 1, 1, 3)) - 30
    x[5] = 0
    for stride in (1, 2):
        assert_same(TRITON.measure(x, None, stride), TORCH.measure(x, None, stride))


def test_similarity_of_an_image_with_a_denormal_norm():
    """A GPU's rsqrt takes it for 0, of which the weight would be infinite."""
    x = random_input((4, 8, 9, 9), dtype=torch.float32)
    x[0] = 0
    x[0, 0, 0, 0] = 1e-20
    pairs, similarity = TORCH.measure(x.double(), None, 1)[1][1:3]
    found_pairs, found = TRITON.measure(x, None, 1)[1][1:3].double()
    assert found_pairs == pairs
    # Of a square of 1e-40 few bits are left, and a GPU may take it for 0, too.
    torch.testing.assert_close(found, similarity, rtol=0, atol=0.05)


@pytest.mark.parametrize('value', [float('nan'), float('inf'), 1e200], ids=str)
def test_similarity_of_a_batch_that_is_not_finite(value):
    """Nor are its squares at 1e200."""
    x = random_input((3, 4, 3, 3))
    x[1, 2, 0, 0] = value
    for stride in (1, 2):
        assert TRITON.measure(x, None, stride)[1][1:3].tolist() == [0, 0]


@pytest.mark.usefixtures('_programs')
@pytest.mark.parametrize('layout', LAYOUTS)
def test_squared_sum(layout):
    x = random_input((3, 6, 5, 7), layout)
    weight = torch.randn(3, dtype=torch.float64)
    expected = TORCH.squared_sum(x, weight)
    torch.testing.assert_close(TRITON.squared_sum(x, weight), expected)
    torch.testing.assert_close(TRITON.squared_sum(x.flatten(1), weight), expected)


ROWS = {
    'open': [[12, 2, 0.9]],
    'shut': [[12, 2, -0.9]],
    'not_measured': [[12, 0, 0]],
    'one_value': [[1, 0, 0]],
    'ranks': [[12, 2, 0.9], [5, 6, 0.3], [0, 0, 0]],
    'nan': [[12, 2, float('nan')]],
}
SETTINGS = {
    'no_gate': Settings(),
    'cumulative': Settings(momentum=None),
    'gate': Settings(fct=0.35, similarity_weight=0.3),
    'gate_cumulative': Settings(fct=0.35, similarity_weight=0.7, momentum=None, eps=0.3),
    'precise': Settings(momentum=1.0),
    'warmup': Settings(fct=0.35, similarity_weight=1.0, warmup=4),
    'again': Settings(fct=0.35, update=False),
    'no_update': Settings(update=False),
    'evaluation': Settings(training=False),
}


@pytest.mark.parametrize(
    ('settings', 'rows', 'dtype'),
    [
        *((settings, rows, torch.float64) for settings in SETTINGS for rows in ROWS),
        ('no_gate', 'open', torch.float16),
        ('gate', 'ranks', torch.float16),
    ],
)
def test_gate_and_running_statistics(settings, rows, dtype):
    """With the NaN a mean that is not finite, in the second block of channels."""
    settings, channels = SETTINGS[settings], 1030 if rows == 'nan' else 5
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.zeros(1, channels, 1, 2, dtype=torch.promote_types(dtype, torch.float32))
    known = torch.tensor(ROWS[rows], dtype=wide)
    means, variances = torch.randn(len(known), channels), torch.rand(len(known), channels)
    if rows == 'nan':
        means[0, -1], variances[0, -1] = float('inf'), float('nan')
    gathered = torch.cat([known, means.to(wide), variances.to(wide)], 1)
    gathered = gathered if settings.training else None
    for gate in (False, True)[: 1 if settings.update else 2]:
        first = random_buffers(channels, dtype)
        first.gate.fill_(gate)
        second = copy(first)
        image_mean = torch.zeros(1, channels, dtype=wide) if settings.training else None
        arguments = x, image_mean, gathered, Parameters()
        expected = TORCH.normalize(*arguments, first, settings)[2]
        actual = TRITON.normalize(*arguments, second, settings)[2]
        # Torch rounds what moves to half precision more than once.
        tolerance = dict(rtol=1e-2, atol=1e-3) if dtype == torch.float16 else {}
        assert_same([actual, *second], [expected, *first], equal_nan=True, **tolerance)


def test_statistics_without_buffers():
    x = random_input((2, 3, 4, 4))
    image_mean, row = TORCH.measure(x, None, 0)
    arguments = x, image_mean, row[None], Parameters(), Buffers(), Settings(update=False)
    assert_same(TRITON.normalize(*arguments), TORCH.normalize(*arguments))


LAYERS = {
    'ubn': dict(fct=0.35),
    'ubn_gate_alone': dict(fct=0.35, without=CALIBRATION),
    'ubn_shut': dict(fct=0.999),
    'ubn_no_affine': dict(fct=0.35, without=('weight', 'kernel', 'bias')),
    'no_bias': dict(without=('bias',)),
    'bnet': dict(without=CALIBRATION),
    'iebn': dict(without=('center_weight',), scale_from_input=True),
    'ubn_evaluation': dict(training=False),
    'bnet_evaluation': dict(training=False, without=CALIBRATION),
}
# By shape, kernel size and layouts of X and dY; what is new in each.
MAPS = [
    *[(shape, 3, layout, layout) for shape in SHAPES for layout in LAYOUTS[:2]],
    ((2, 3, 18, 5), 1, 'channels_last', 'contiguous'),
    ((2, 3, 5, 7), 1, 'strided', 'channels_last'),
    ((2, 3, 2, 7), 5, 'contiguous', 'expanded'),
    ((1, 2, 1, 4), 7, 'channels_last', 'expanded'),
    ((2, 3, 6, 7), 3, 'strided', 'strided'),
    ((2, 3, 6, 7), 3, 'transposed', 'contiguous'),
]


def assert_steps_agree(layer, shape, kernel_size, layout, dy_layout):
    settings = dict(LAYERS[layer])
    x, channels = random_input(shape, layout), shape[1]
    dy = torch.randn(shape, dtype=torch.float64)
    dy = dy[:1, :, :1, :1].expand(shape) if dy_layout == 'expanded' else arrange(dy, dy_layout)
    parameters = random_parameters(channels, kernel_size, without=settings.pop('without', ()))
    settings, first = Settings(**settings), random_buffers(channels)
    second, stride = copy(first), 1 if settings.fct else 0
    expected = run_step(TORCH, x, dy, parameters, first, settings, stride)
    actual = run_step(TRITON, x, dy, parameters, second, settings, stride)
    assert actual['y'].stride() == torch.empty_like(x).stride()
    assert_same(actual, expected)
    assert_same(second, first)


@pytest.mark.usefixtures('_programs')
@pytest.mark.parametrize('case', MAPS, ids=str)
def test_step_by_shape(case):
    assert_steps_agree('ubn', *case)


def test_more_parts_than_are_added_at_once():
    """Shares of the pixels and tiles: one after the other, hundreds would wait for memory."""
    shape = batch, channels, height, width = 9, 17, 3, 45
    at_once = triton_backend._at_once(2, 16 * 16)
    assert triton_backend._split_pixels(batch, channels, height * width, True, True)[1] > at_once
    assert triton_backend._tile(TRITON.tiles, *shape, True, 3).grid[1] > at_once
    assert_steps_agree('ubn', shape, 3, 'channels_last', 'channels_last')


@pytest.mark.parametrize('layer', LAYERS)
@pytest.mark.parametrize('kernel_size', [1, 3])
def test_step_by_layer(layer, kernel_size):
    assert_steps_agree(layer, (3, 3, 4, 5), kernel_size, 'contiguous', 'contiguous')


def test_image_mean_that_was_not_kept():
    """Backward takes it from X again."""
    x, dy = random_input((2, 40, 7, 7), 'channels_last'), torch.randn(2, 40, 7, 7).double()
    parameters, settings = random_parameters(40, 1), Settings()
    image_mean, row = TORCH.measure(x, parameters.center_weight, 0)
    buffers = random_buffers(40)
    statistics = TORCH.normalize(x, image_mean, row[None], parameters, buffers, settings)[2]
    results = []
    for kept in (image_mean, None):
        sums = TRITON.backward_sums(x, dy, kept, statistics, parameters, settings)
        known = statistics, sums.d_statistics, parameters, settings, sums
        results.append((*sums.gradients, *TRITON.backward_input(x, *known)))
    assert_same(results[1], results[0])


def test_half_parameters_and_buffers():
    """They are converted inside; their gradients have their dtype."""
    x, dy = random_input((2, 3, 5, 6), dtype=torch.float32), torch.randn(2, 3, 5, 6)
    parameters = random_parameters(3, 3, torch.float16)
    buffers, settings = random_buffers(3, torch.float16), Settings(fct=0.35)
    expected = run_step(TORCH, x, dy, parameters, copy(buffers), settings)
    actual = run_step(TRITON, x, dy, parameters, buffers, settings)
    # Pops the gradients: the rest has the dtype of the statistics.
    for name in [f'd_{field}' for field in Parameters._fields]:
        got, wanted = actual.pop(name), expected.pop(name)
        assert got.dtype == torch.float16
        torch.testing.assert_close(got, wanted.half(), rtol=2e-3, atol=2e-3)
    assert_same(actual, expected, rtol=2e-5, atol=2e-4)


def test_huge_activations():
    """The cube of 1 / sigma is below every number of float32."""
    x, dy = 1e16 * torch.randn(2, 2, 3, 4, 5)
    parameters, buffers = random_parameters(3, 3, torch.float32), random_buffers(3, torch.float32)
    double = Parameters(*[value.double() for value in parameters])
    expected = run_step(TORCH, x.double(), dy.double(), double, copy(buffers), Settings(), stride=0)
    actual = run_step(TRITON, x, dy, parameters, buffers, Settings(), stride=0)
    actual, expected = actual['dx'].double(), expected['dx']  # about 1
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures('_programs')
@pytest.mark.parametrize('layout', LAYOUTS[:2])
def test_a_mean_whose_square_overflows(layout):
    """The variance does not; of more pixels than a block, and of places that see none."""
    x = arrange(1e20 * (1 + 1e-3 * torch.randn(3, 2, 5, 210)), layout)
    image_mean, row = TRITON.measure(x, None, 0)
    expected_mean, expected = TORCH.measure(x.double(), None, 0)
    torch.testing.assert_close(image_mean.double(), expected_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(row.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.usefixtures('_programs')
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_torch(dtype, kernel_device):
    """Both beside float64 on the same rounded input, over eight of them: rounding is luck."""
    if dtype == torch.bfloat16 and kernel_device == 'cpu':
        pytest.skip('the interpreter cuts off to bfloat16 where a GPU rounds')
    settings, errors = Settings(fct=0.35), []
    for _ in range(8):
        x, dy = random_input((2, 3, 4, 25), dtype=dtype), torch.randn(2, 3, 4, 25).to(dtype)
        parameters = random_parameters(3, 3, torch.float32)
        buffers = random_buffers(3, torch.float32)
        double = Parameters(*[value.double() for value in parameters])
        oracle = run_step(TORCH, x.double(), dy.double(), double, copy(buffers), settings)
        eager = run_step(TORCH, x, dy, parameters, copy(buffers), settings)
        fused = run_step(TRITON, x, dy, parameters, copy(buffers), settings)
        for name, expected in oracle.items():
            by_torch, by_triton = eager[name], fused[name]
            assert by_triton.dtype == by_torch.dtype
            largest = expected.abs().max()
            errors += [(value - expected).abs().max() / largest for value in (by_torch, by_triton)]
    by_torch, by_triton = torch.stack(errors).view(8, -1, 2).square().mean(0).sqrt().unbind(-1)
    assert (by_triton <= 2 * by_torch + 2e-6).all(), by_triton / by_torch


# Corners, edges and the middle, one a channel; tiles meet at row 24.
PLACES = [(0, 0), (0, 2), (24, 1), (25, 4), (26, 3), (12, 2)]


@pytest.mark.parametrize('where', ['x', 'dy'])
def test_what_is_not_finite_spreads_as_in_the_reference(where):
    """From one value a channel, of X in evaluation or of dY."""
    channels = len(PLACES)
    x, dy = torch.randn(2, 1, channels, 27, 5, dtype=torch.float64)
    for channel, (row, column) in enumerate(PLACES):
        (x if where == 'x' else dy)[0, channel, row, column] = float('inf')
    parameters = random_parameters(channels, 3, without=CALIBRATION)
    buffers, settings = random_buffers(channels), Settings(training=False)
    made = run_step(TRITON, x, dy, parameters, buffers, settings)
    x.requires_grad_()
    wanted = [x, parameters.weight.requires_grad_(), parameters.kernel.requires_grad_()]
    expected = reference.normalize(
        x,
        buffers.running_mean,
        buffers.running_var,
        settings.eps,
        parameters.weight,
        parameters.bias,
        parameters.kernel,
    )
    expected_gradients = torch.autograd.grad(expected, wanted, dy)
    names = ('y', 'dx', 'd_weight', 'd_kernel')
    for name, oracle in zip(names, [expected, *expected_gradients]):
        actual = made[name]
        finite = oracle.isfinite()
        assert torch.equal(actual.isfinite(), finite)
        torch.testing.assert_close(actual[finite], oracle[finite])


@pytest.mark.parametrize('channels_last', [True, False])
def test_a_long_signal_fits_into_a_grid(channels_last):
    tiling = triton_backend._tile(Tiles(), 1, 64, 1, 600_000, channels_last, 5)
    assert tiling.grid[1] <= 65535
    assert tiling.grid[0] * tiling.grid[1] * tiling.blocks[0] * tiling.blocks[1] >= 64 * 600_000


class Launches(TorchDispatchMode):
    """What a GPU would have been told to run: kernels, and torch's operations but for views and
    fresh memory.
    """

    def __init__(self, monkeypatch, layer):
        super().__init__()
        self.names, self._inside = [], False
        self._on_host = getattr(layer, '_steps', None)
        kernel_type = type(kernels.moments)
        on_grid = kernel_type.__getitem__

        def counted(kernel, grid):
            launch = on_grid(kernel, grid)

            def call(*arguments, **keywords):
                self.names.append(kernel.__name__)
                self._inside = True  # the interpreter copies arguments
                try:
                    return launch(*arguments, **keywords)
                finally:
                    self._inside = False

            return call

        monkeypatch.setattr(kernel_type, '__getitem__', counted)

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        returns = function._schema.returns
        view = all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        name = function._schema.name
        free = view or name.startswith(('aten::empty', 'aten::new_empty'))
        if not (self._inside or free or arguments[0] is self._on_host):
            self.names.append(name)
        return function(*arguments, **(keywords or {}))


COUNTED = {
    **{
        name.lower(): lambda name=name: getattr(layers, name)(4, backend='triton')
        for name in layers.__all__
    },
    'ubn_sampled': lambda: UBN(4, backend='triton', fct_stride=2, fct_interval=2),
    'ubn_cumulative': lambda: UBN(4, backend='triton', momentum=None),
    'ubn_no_gate': lambda: UBN(4, backend='triton', fct=None),
    'ubn_no_affine': lambda: UBN(4, backend='triton', affine=False),
    'ubn_gate_alone': lambda: UBN(4, backend='triton', kernel_size=1, center=False, scale=False),
    'ubn_untracked': lambda: UBN(4, backend='triton', fct=None, track_running_stats=False),
    'ubn_half': lambda: UBN(4, backend='triton', dtype=torch.float16),
}


@pytest.mark.parametrize('training', [True, False], ids=['training', 'evaluation'])
@pytest.mark.parametrize(
    ('name', 'width'),
    [('ubn', 7), *((name, 60) for name in COUNTED)],  # the larger alone keeps the image means
)
@pytest.mark.parametrize('layouts', [LAYOUTS[:1] * 2, LAYOUTS[:2], LAYOUTS[1::-1]], ids='_'.join)
def test_at_most_five_launches_forward_and_four_backward(
    name, width, layouts, training, monkeypatch
):
    """Also where dY comes in another memory format than X."""
    layer = COUNTED[name]().train(training)
    if name == 'syncubn':
        rows = torch.rand(2, 2 * 4 + 3)
        monkeypatch.setattr(SyncUBN, '_group', lambda self: self.training or None)
        monkeypatch.setattr(sys.modules['mmubn.ops.step'], '_all_gather', lambda row, group: rows)
        monkeypatch.setattr(torch.distributed, 'all_reduce', lambda value, group: None)
    dtype = torch.float16 if name == 'ubn_half' else torch.float32
    values = torch.randn(2, 2, 4, 3, width).to(dtype)
    x, dy = map(arrange, values, layouts)
    inputs = [x.requires_grad_(), *layer.parameters()]
    for _ in range(2 if name == 'ubn_sampled' else 1):  # measures the similarity, and does not
        with Launches(monkeypatch, layer) as launches:
            y = layer(x)
            forward = list(launches.names)
            torch.autograd.grad(y, inputs, dy)
        backward = launches.names[len(forward) :]
        assert 1 <= len(forward) <= 5, forward
        assert 1 <= len(backward) <= 4, backward


@pytest.mark.newer_torch('DTensor is a prototype there', than='2.4')
@pytest.mark.usefixtures('one_process')
def test_parameters_and_inputs_that_keep_their_numbers_elsewhere():
    """A kernel would read address 0 as None."""
    tensor = pytest.importorskip('torch.distributed.tensor')
    mesh = tensor.init_device_mesh('cpu', (1,))

    def there(value):
        return tensor.distribute_tensor(value.detach(), mesh, [tensor.Replicate()])

    layer, x = UBN(4, backend='triton'), torch.randn(2, 4, 5, 5)
    assert TRITON.why_not(there(x), 3) == 'the input is a DTensor'
    layer.center_weight = torch.nn.Parameter(there(layer.center_weight))
    with pytest.raises(RuntimeError, match=r'mixed torch\.Tensor and DTensor'):
        layer.eval()(x)

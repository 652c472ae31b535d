"""The C++ backend: against torch in float64, against torch's errors, and as a library."""

import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
from one_step import CALIBRATION, assert_same, copy, random_buffers, random_parameters, run_step
from torch import multiprocessing
from weights import trained

from mmubn import layers
from mmubn.layers import UBN
from mmubn.ops import Parameters, Settings, cpp_build
from mmubn.ops.backend import CPP, TORCH
from mmubn.ops.interface import Backend
from mmubn.ops.utils import statistics_dtype

WHY_NOT = CPP.why_not(torch.zeros(1, 1, 1, 1), 3)
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)

# Planes of a pixel, a row, a column; of fewer and of more than a vector; of several strips, and of
# parts of an image. Channels that fill vectors and that do not, and so many that channels_last
# packs them. Few images and more.
SHAPES = [
    (2, 3, 1, 1),
    (3, 17, 4, 4),
    (2, 3, 1, 6),
    (2, 17, 5, 1),
    (5, 40, 2, 2),
    (4, 20, 9, 9),
    (3, 4, 2, 300),
    (6, 18, 40, 30),
    (3, 1030, 5, 4),
    (2, 40, 7, 450),
]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
# By name, which calibrations a layer does without.
RECTIFIED = dict(
    ubn=(), center=('scale_weight', 'scale_bias'), scale=('center_weight',), none=CALIBRATION
)


def both(x, dy, given, settings, ranks=1):
    """What C++ makes and what torch does, with the buffers afterwards."""
    state = random_buffers(x.shape[1], given.weight.dtype, gate=True)
    results = []
    for backend, owned in ((CPP, state), (TORCH, copy(state))):
        torch.manual_seed(1)
        made = run_step(backend, x, dy, given, owned, settings, settings.stride, ranks)
        moved = {f'buffer {name}': value for name, value in owned._asdict().items()}
        results.append({**made, **moved})
    return results


def equal(x, dy, given, settings, ranks=1):
    assert_same(*both(x, dy, given, settings, ranks))


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('kernel_size', [1, 3, 5, 7])
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_shapes_and_kernels(shape, kernel_size, layout):
    """In float64; a mean of 30 shows what cancels."""
    x = (torch.randn(shape, dtype=torch.float64) + 30).contiguous(memory_format=layout)
    dy = torch.randn_like(x)
    equal(x, dy, random_parameters(shape[1], kernel_size), Settings(fct=0.15))
    x -= 30
    equal(x, dy, random_parameters(shape[1], kernel_size), Settings(training=False))


@pytest.mark.parametrize(
    'settings',
    [
        Settings(),
        Settings(fct=0.99),  # shuts the gate
        Settings(fct=0.99, warmup=4),
        Settings(fct=0.15, stride=0),  # nothing is measured
        Settings(fct=0.15, stride=2),
        Settings(fct=0.15, update=False),
        Settings(momentum=None),
        Settings(eps=0.1, scale_from_input=True),
        Settings(training=False, scale_from_input=True),
    ],
    ids=lambda settings: str({k: v for k, v in settings._asdict().items() if v}),
)
@pytest.mark.parametrize('rectified', RECTIFIED)
@pytest.mark.parametrize('ranks', [1, 3])
def test_settings(settings, rectified, ranks):
    if settings.scale_from_input and rectified != 'scale':
        pytest.skip('IEBN scales and does not center')
    x = torch.randn(4, 19, 6, 5, dtype=torch.float64) + 0.5
    given = random_parameters(19, 3, without=RECTIFIED[rectified])
    equal(x, torch.randn_like(x), given, settings, ranks)


@pytest.mark.parametrize('rectified', RECTIFIED)
@pytest.mark.parametrize(
    'shape', [(4, 19, 6, 5), (20, 130, 4, 4), (3, 17, 14, 11), (2, 40, 7, 450)], ids=str
)
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('kernel_size', [3, 5])
def test_one_call_is_the_parts(kernel_size, shape, layout, rectified):
    """Of one process; bit for bit."""
    x = torch.randn(shape).contiguous(memory_format=layout)
    dy = torch.randn_like(x)
    given = random_parameters(shape[1], kernel_size, torch.float32, RECTIFIED[rectified])
    for settings in (Settings(fct=0.15), Settings(fct=0.99), Settings(stride=0)):
        made = []
        for forward, backward in (
            (CPP.forward, CPP.backward),
            (Backend.forward.__get__(CPP), Backend.backward.__get__(CPP)),
        ):
            torch.manual_seed(0)
            state = random_buffers(shape[1], torch.float32, gate=True)
            y, image_mean, statistics = forward(x, settings.stride, given, state, settings)
            results = [y, image_mean, statistics, *state]
            for known in (image_mean, None):
                dx, gradients = backward(x, dy, known, statistics, given, settings)
                results += [dx, *gradients]
            made.append([value for value in results if value is not None])
        whole, parts = made
        assert len(whole) == len(parts)
        assert all(map(torch.equal, whole, parts))


def test_one_image_has_no_similarity():
    x = torch.randn(1, 5, 6, 5, dtype=torch.float64)
    equal(x, torch.randn_like(x), random_parameters(5, 3), Settings(fct=0.15))
    made, _ = both(x, torch.randn_like(x), random_parameters(5, 3), Settings(fct=0.15))
    assert made['buffer running_similarity'] == 0.4


@pytest.mark.parametrize('strided', ['input', 'gradient', 'both'])
def test_strides(strided):
    x, dy = torch.randn(2, 3, 5, 7, 12, dtype=torch.float64)
    if strided != 'gradient':
        x = x[..., ::2]
    if strided != 'input':
        dy = dy.transpose(1, 2).contiguous().transpose(1, 2)
    x, dy = x[..., :6], dy[..., :6]
    equal(x, dy, random_parameters(5, 3), Settings(fct=0.15))


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('shape', [(8, 33, 4, 4), (4, 20, 19, 21)], ids=str)
def test_error_is_at_most_twice_that_of_torch(shape, dtype, layout):
    """Both beside float64 on the same rounded input; over eight, as one is chance."""
    settings = Settings(fct=0.15)
    error, allowed = Counter(), Counter()
    for _ in range(8):
        x = (torch.randn(shape) + 1).to(dtype).contiguous(memory_format=layout)
        dy = torch.randn(shape).to(dtype).contiguous(memory_format=layout)
        given = random_parameters(shape[1], 3, torch.float32)
        by_cpp, by_torch = both(x, dy, given, settings)
        wide = Parameters(*[value.double() for value in given])
        _, oracle = both(x.double(), dy.double(), wide, settings)
        for name, expected in oracle.items():
            if expected is None or not expected.is_floating_point() or name.startswith('buffer'):
                continue
            assert by_cpp[name].dtype == by_torch[name].dtype
            largest = expected.abs().max()
            error[name] += ((by_cpp[name] - expected).abs().max() / largest).item()
            by_torch_error = (by_torch[name] - expected).abs().max() / largest
            allowed[name] += (2 * by_torch_error + 2e-6).item()
    assert error
    assert all(error[name] <= allowed[name] for name in error), (error, allowed)


@pytest.mark.parametrize(
    ('dtype', 'k'), [(torch.float32, 3), (torch.bfloat16, 3), (torch.float32, 5)], ids=str
)
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('shape', [(33, 125, 8, 6), (6, 24, 33, 30), (2, 24, 33, 300)], ids=str)
def test_threads_change_no_bit(shape, layout, dtype, k):
    x = torch.randn(shape).to(dtype).contiguous(memory_format=layout)
    dy = torch.randn_like(x)
    given = random_parameters(shape[1], k, torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            torch.manual_seed(2)
            made = both(x, dy, given, Settings(fct=0.15))[0]
            results.append({key: value for key, value in made.items() if value is not None})
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


@pytest.mark.parametrize('bad', [float('inf'), float('nan')])
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize(
    'shape', [(2, 5, 4, 5), (2, 1030, 4, 5), (2, 16, 12, 30), (2, 16, 30, 160)], ids=str
)
@pytest.mark.parametrize(
    ('dtype', 'k'),
    [
        (torch.float32, 3),
        (torch.bfloat16, 3),
        (torch.float64, 3),
        *((torch.float32, k) for k in (1, 5, 7)),
    ],
    ids=str,
)
def test_what_is_not_finite_reaches_what_it_should(dtype, k, shape, layout, bad):
    """In evaluation without calibrations, where nothing but the convolution spreads it."""
    height, width = shape[2:]
    p, kept = k // 2, statistics_dtype(dtype)
    given = random_parameters(shape[1], k, kept, CALIBRATION)
    settings = Settings(training=False)
    for i, j in ((0, 2), (height - 1, width - 1), (2, 0), (1, 2), (height // 3, 0)):
        x = torch.randn(shape, dtype=dtype).contiguous(memory_format=layout)
        dy = torch.randn_like(x)
        x[1, 3, i, j] = bad
        made = run_step(CPP, x, dy, given, random_buffers(shape[1], kept), settings)
        near = torch.zeros(shape, dtype=torch.bool)
        near[1, 3, max(0, i - p) : i + p + 1, max(0, j - p) : j + p + 1] = True
        assert torch.equal(~made['y'].isfinite(), near)
        assert made['dx'].isfinite().all()

        x, dy[1, 3, i, j] = torch.randn_like(x), bad
        made = run_step(CPP, x, dy, given, random_buffers(shape[1], kept), settings)
        assert torch.equal(~made['dx'].isfinite(), near)
        # A tap meets this pixel of dY where it sees a pixel of X inside the plane.
        rows = [u for u in range(k) if 0 <= i + u - p < height]
        columns = [v for v in range(k) if 0 <= j + v - p < width]
        reached = torch.zeros(shape[1], k, k, dtype=torch.bool)
        reached[3, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
        taps = made['d_weight' if k == 1 else 'd_kernel'].reshape(shape[1], k, k)
        assert torch.equal(~taps.isfinite(), reached)


@pytest.mark.parametrize(
    'settings', [Settings(training=False, scale_from_input=True), Settings(fct=0.99)]
)
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('shape', [(2, 5, 4, 5), (2, 16, 12, 30), (2, 16, 30, 160)], ids=str)
def test_an_infinite_mean_is_infinite(shape, layout, settings):
    """With running statistics it shuts or opens the scaling; the other pixels stay finite."""
    given = random_parameters(shape[1], 3, torch.float32, RECTIFIED['scale'])
    x = torch.randn(shape).contiguous(memory_format=layout)
    x[1, 3, 2, 1] = float('inf')
    made, expected = both(x, torch.randn_like(x), given, settings)
    finite = expected['y'].isfinite()
    assert (~finite).sum() == 9  # what the taps reach
    assert torch.equal(made['y'].isfinite(), finite)
    torch.testing.assert_close(made['y'][finite], expected['y'][finite])


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('shape', [(2, 5, 4, 1), (2, 5, 1, 70)], ids=str)
def test_a_tap_that_sees_nothing_has_no_gradient(shape, layout):
    """Also where the scaling of an image is NaN."""
    given = random_parameters(5, 3, without=RECTIFIED['scale'])
    x = torch.randn(shape, dtype=torch.float64).contiguous(memory_format=layout)
    x[1, 3, 0, 0] = float('nan')
    made, expected = both(x, torch.randn_like(x), given, Settings(training=False))
    assert expected['d_kernel'][3].isnan().sum() == 3
    torch.testing.assert_close(made['d_kernel'], expected['d_kernel'], equal_nan=True)


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('shape', [(3, 20, 1, 1), (3, 20, 4, 5), (3, 5, 9, 10)], ids=str)
def test_a_variance_that_overflows_is_infinite(shape, layout):
    """And Y is the bias, not NaN."""
    x = (1e30 * (1 + torch.rand(shape))).contiguous(memory_format=layout)
    given = random_parameters(shape[1], 3, torch.float32)
    made, expected = both(x, torch.randn_like(x), given, Settings())
    assert (made['row'][3 + shape[1] :] == float('inf')).all()
    for name in ('row', 'statistics', 'y'):
        torch.testing.assert_close(made[name], expected[name])


@pytest.mark.parametrize('batch', [1, 3])
def test_a_constant_has_no_variance(batch):
    """Also where its mean is large and centred by a weight."""
    x, weight = torch.full((batch, 20, 4, 4), 1e4), torch.randn(20)
    _, row = CPP.measure(x, weight, 0)
    torch.testing.assert_close(row[3 : 3 + 20], 1e4 * (1 + weight))
    assert row[3 + 20 :].abs().max() < 1e-12


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('shape', [(2, 20, 4, 5), (2, 5, 9, 10)], ids=str)
def test_a_scaling_that_is_shut_is_0(shape, layout):
    """As torch's sigmoid: values so large would show what is left of it."""
    ones = torch.ones(shape[1])
    given = Parameters(weight=ones, bias=ones, scale_weight=-ones, scale_bias=ones)
    x = torch.full(shape, 1e36).contiguous(memory_format=layout)
    made, _ = both(x, torch.ones_like(x), given, Settings(training=False))
    assert (made['y'] == 1).all()
    assert (made['d_scale_weight'] == 0).all()
    for z in (-88, -80):  # and shortly before that it is not
        given = given._replace(scale_bias=z * ones, scale_weight=0 * ones, bias=0 * ones)
        made, expected = both(x, torch.ones_like(x), given, Settings(training=False))
        torch.testing.assert_close(made['y'], expected['y'])


NO_MEMORY = """
import resource
import torch
from mmubn.ops import Parameters, Settings
from mmubn.ops.backend import CPP
torch.set_num_threads(2)
x, weight = torch.randn(16, 250000, 1, 1), torch.ones(250000)
given = Parameters(weight=weight, scale_weight=weight, scale_bias=weight)
statistics = torch.ones(2 * 250000 + 1)
CPP.backward(x[:2], x[:2], None, statistics, given, Settings())  # what threads and torch need
used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (30 << 20), -1))
for step in (
    lambda: CPP.measure(x, None, 1),
    lambda: CPP.backward(x, x, None, statistics, given, Settings()),
):
    try:
        step()
    except MemoryError as error:
        print(error)
"""


def test_where_memory_runs_out_it_says_so():
    """And does not end the process."""
    result = subprocess.run([sys.executable, '-c', NO_MEMORY], capture_output=True, text=True)
    line = 'the C++ of UBN found no memory for a step: use fewer images\n'
    assert result.stdout == 2 * line, result.stderr


@pytest.mark.parametrize('name', layers.__all__)
def test_autograd_takes_it(name):
    """Layers with it and with torch give the same, in training and in evaluation."""
    make = getattr(layers, name)
    pair = [make(6, backend=backend).double() for backend in ('cpp', 'torch')]
    trained(pair[0])
    pair[1].load_state_dict(pair[0].state_dict())
    x = torch.randn(4, 6, 7, 8, dtype=torch.double, requires_grad=True)
    dy = torch.randn_like(x)
    for training in (True, False):
        results = []
        for layer in pair:
            layer.train(training).zero_grad()
            y = layer(x)
            (dx,) = torch.autograd.grad(y, x, dy, retain_graph=True)
            y.backward(dy)
            gradients = [parameter.grad for parameter in layer.parameters()]
            results.append([y, dx, *gradients, *layer.state_dict().values()])
        for ours, theirs in zip(*results):
            torch.testing.assert_close(ours, theirs)


def test_threads_of_python():
    """Several layers at once, whose scratch memory may not be one."""
    x = torch.randn(4, 20, 9, 9)
    expected = UBN(20, backend='cpp')(x)
    outputs = [None] * 4

    def run(index):
        for _ in range(20):
            outputs[index] = UBN(20, backend='cpp')(x)

    workers = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(output, expected) for output in outputs)


def _in_worker(queue, x):
    torch.set_num_threads(1)  # as a worker of a DataLoader
    queue.put(UBN(x.shape[1], backend='cpp')(x).detach().numpy())


def test_forked_worker():
    x = torch.randn(8, 16, 20, 20)
    expected = UBN(16, backend='cpp')(x)
    context = multiprocessing.get_context('fork')
    queue = context.SimpleQueue()
    worker = context.Process(target=_in_worker, args=(queue, x))
    worker.start()
    found = queue.get()
    worker.join(60)
    assert worker.exitcode == 0
    assert torch.equal(torch.from_numpy(found), expected)


def test_loading_flushes_no_denormals():
    UBN(3, backend='cpp')(torch.randn(2, 3, 4, 4))
    assert (torch.tensor([1e-40]) * torch.tensor([1.0])).item() > 0


@pytest.fixture(scope='module', params=[('float', 3), ('ubn::bf16', 7)], ids=str)
def sanitized(request, tmp_path_factory):
    """memory_check.cpp for a dtype and k."""
    (dtype, kernel_size), program = request.param, tmp_path_factory.mktemp('sanitized') / 'check'
    flags = ['-O1', '-std=c++17', '-march=native', '-fsanitize=address', f'-I{cpp_build._SOURCES}']
    command = [*cpp_build._compiler(), *flags, f'-DUBN_T={dtype}', f'-DUBN_K={kernel_size}']
    command += [str(Path(__file__).with_name('memory_check.cpp')), '-o', str(program)]
    built = subprocess.run(command, capture_output=True, text=True)
    if 'asan' in built.stderr:
        pytest.skip('the compiler has no address sanitizer')
    assert built.returncode == 0, built.stderr
    return program


def test_nothing_outside_of_a_tensor_is_touched(sanitized):
    run = subprocess.run([sanitized], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[:2000]


def test_tiles_after_memory_ran_out(sanitized):
    """What is allocated anew at the old place has no zeros around it."""
    options = 'allocator_may_return_null=1:quarantine_size_mb=0:thread_local_quarantine_size_kb=0'
    environment = {**os.environ, 'ASAN_OPTIONS': options}
    run = subprocess.run([sanitized, 'tiles'], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, (run.returncode, run.stderr[:2000])

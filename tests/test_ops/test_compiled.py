"""The operators of compiled networks: they return what they promise to the compiler."""

import importlib

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_map_only

from mmubn.ops import Buffers, Parameters, Settings, compiled
from mmubn.ops.backend import CPP
from mmubn.ops.utils import statistics_dtype

pytestmark = pytest.mark.newer_torch(
    'a step is an operator of the graph from torch 2.4 on', than='2.3'
)

INPUTS = {
    'contiguous': lambda x: x,
    'channels_last': lambda x: x.contiguous(memory_format=torch.channels_last),
    # As the branches of a CSP stage get it.
    'half of channels_last': lambda x: (
        torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last).chunk(2, 1)[0]
    ),
    'transposed': lambda x: x.mT.contiguous().mT,
}


@pytest.fixture(params=['torch', 'cpp', 'triton'])
def backend(request):
    if request.param == 'cpp' and CPP.why_not(torch.zeros(1, 1, 1, 1), 3):
        pytest.skip(CPP.why_not(torch.zeros(1, 1, 1, 1), 3))
    if request.param == 'triton':
        request.getfixturevalue('on_kernel_device')
    return request.param


@pytest.mark.parametrize('arrange', INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize(
    ('dtype', 'own'),  # of X, of the parameters
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
@pytest.mark.parametrize('width', [4, 60])  # the larger alone keeps the image means
@pytest.mark.parametrize('training', [True, False], ids=['training', 'evaluation'])
def test_outputs_are_those_of_the_fake(backend, training, width, dtype, own, arrange):
    """In dtype, shape and strides: code that a compiler makes of these reads the memory by them."""
    channels = 4
    vectors = torch.randn(len(Parameters._fields), channels, dtype=own)
    kernel = torch.randn(channels, 1, 3, 3, dtype=own)
    parameters = Parameters(*vectors.unbind())._replace(kernel=kernel)
    buffers = Buffers(
        torch.zeros(channels, dtype=own),
        torch.ones(channels, dtype=own),
        torch.tensor(0),
        torch.ones((), dtype=own),
        torch.tensor(True),
    )
    settings = Settings(training=training, fct=0.1)
    x = arrange(torch.randn(2, channels, 5, width, dtype=dtype))
    given = (*parameters, *buffers, *settings, backend)
    _, image_mean, statistics, _ = assert_as_promised(torch.ops.mmubn.step, x, *given)
    assert statistics.dtype == statistics_dtype(dtype)
    dy = torch.randn_like(x)
    kept = (*parameters._replace(bias=None), *Buffers(), *settings, backend)
    assert_as_promised(torch.ops.mmubn.step_backward, dy, x, image_mean, statistics, *kept)


def assert_as_promised(operator, *arguments):
    """Runs it, and compares with what its fake returns."""
    with FakeTensorMode() as mode:
        fakes = tree_map_only(torch.Tensor, mode.from_tensor, arguments)
        promised = operator(*fakes)
    returned = operator(*arguments)
    for own, fake in zip(tree_flatten(returned)[0], tree_flatten(promised)[0]):
        assert (own.dtype, own.shape, own.stride()) == (fake.dtype, fake.shape, fake.stride())
    return returned


def test_a_second_import_finds_the_operators():
    """As after %autoreload in a notebook: torch takes no second definition of an operator."""
    x = torch.randn(2, 3, 4, 4)
    given = (*Parameters(torch.rand(3)), *Buffers(), *Settings(), 'torch')
    before = torch.ops.mmubn.step(x, *given)[0]
    importlib.reload(compiled)
    assert torch.equal(torch.ops.mmubn.step(x, *given)[0], before)

"""What other code changes on a built BatchNorm has the same effect on the layers.

Each layer has its rectifications neutral here, so that it is BatchNorm for a user: output,
gradients and every buffer are compared with those of ``nn.BatchNorm2d`` under the same change.
"""

import copy
import pickle

import pytest
import torch
from against_batch_norm import CHANNELS, assert_same_steps, pair
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn
from weights import assert_same_state

from mmubn import layers
from mmubn.ops import Parameters
from mmubn.ops.backend import CPP

# RBN has what UBN has of it; SyncUBN is asked where its process group could matter.
KINDS = ['UBN', 'BNET', 'IEBN']


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def set_attributes(**values):
    def change(norm):
        for name, value in values.items():
            setattr(norm, name, value)

    return change


def freeze_weight(norm):
    norm.weight.requires_grad = False


def lightning_swa(norm):
    """StochasticWeightAveraging.reset_batch_norm_and_save_state."""
    norm.running_mean = torch.zeros_like(norm.running_mean)
    norm.running_var = torch.ones_like(norm.running_var)
    norm.momentum = None
    norm.num_batches_tracked *= 0


CHANGES = {
    'nothing': lambda norm: None,
    'eps': set_attributes(eps=0.3),
    'momentum': set_attributes(momentum=0.5),
    'momentum 0': set_attributes(momentum=0.0),
    'momentum 1': set_attributes(momentum=1.0),
    'momentum None': set_attributes(momentum=None),
    'no tracking': set_attributes(track_running_stats=False),
    'no statistics': set_attributes(running_mean=None, running_var=None),
    'no statistics, no tracking': lambda norm: torch.func.replace_all_batch_norm_modules_(norm),
    'no count': set_attributes(num_batches_tracked=None),
    'no count, momentum None': set_attributes(num_batches_tracked=None, momentum=None),
    'other count': lambda norm: set_attributes(num_batches_tracked=torch.tensor(40), momentum=None)(
        norm
    ),
    'other statistics': lambda norm: set_attributes(
        running_mean=torch.arange(4.0), running_var=torch.arange(1.0, 5)
    )(norm),
    'every buffer in float': lambda norm: norm.type(torch.float32),
    'a count in half': lambda norm: set_attributes(
        num_batches_tracked=torch.tensor(3, dtype=torch.bfloat16), momentum=None
    )(norm),
    'strided statistics': lambda norm: set_attributes(
        running_mean=torch.arange(8.0)[::2], running_var=torch.arange(1.0, 9)[1::2]
    )(norm),
    'no bias': set_attributes(bias=None),
    'frozen weight': freeze_weight,
    'num_features': set_attributes(num_features=7),
    'reset_running_stats': lambda norm: norm.reset_running_stats(),
    'affine': set_attributes(affine=False),
    'training by attribute': set_attributes(training=False),
    'lightning_swa': lightning_swa,
}


@pytest.mark.parametrize('backend', ['auto', 'torch'])
@pytest.mark.parametrize('change', CHANGES.values(), ids=CHANGES)
def test_a_change_has_batch_norms_effect(kind, change, backend):
    batch_norm, layer = pair(kind, dict(backend=backend))
    change(batch_norm)
    change(layer)
    training = batch_norm.training
    assert_same_steps(batch_norm, layer)
    tracks = layer.track_running_stats and layer.running_mean is not None and training
    if isinstance(layer, layers.UBN) and not tracks:  # the similarity is one of them
        assert layer.running_similarity == 1


@pytest.mark.usefixtures('on_kernel_device')
@pytest.mark.parametrize('change', CHANGES.values(), ids=CHANGES)
def test_a_change_has_batch_norms_effect_on_the_kernels(change):
    norms = pair('UBN', dict(backend='triton'))
    for norm in norms:
        change(norm)
    # In the interpreter each image of a channel takes its time.
    assert_same_steps(*norms, steps=1, shape=(2, CHANNELS, 3, 4))


def on_meta_then_assigned(layer):
    with torch.device('meta'):
        empty = type(layer)(CHANNELS)
    empty.load_state_dict(layer.state_dict(), assign=True)
    return empty


def on_meta_assigned_then_moved(layer):
    return on_meta_then_assigned(layer).to('cpu')


def on_meta_then_empty_then_loaded(layer):
    empty = copy.deepcopy(layer).to('meta').to_empty(device='cpu')
    empty.load_state_dict(layer.state_dict())
    return empty


@pytest.mark.parametrize(
    'make', [on_meta_then_assigned, on_meta_assigned_then_moved, on_meta_then_empty_then_loaded]
)
@pytest.mark.parametrize('backend', ['auto', 'torch'])
def test_built_on_meta(kind, make, backend):
    batch_norm, layer = pair(kind)
    layer = make(layer)
    layer.backend = backend
    assert_same_steps(batch_norm, layer)


def test_a_step_with_tensors_from_elsewhere(kind):
    batch_norm, layer = pair(kind)
    state = copy.deepcopy(layer.state_dict())
    x = torch.randn(5, CHANNELS, 6, 7)
    y = torch.func.functional_call(copy.deepcopy(layer).to('meta'), state, (x,))
    torch.testing.assert_close(y, batch_norm(x))
    torch.testing.assert_close(state['running_mean'], batch_norm.running_mean)


def test_compiled_code_gets_no_statistics_of_another_device(kind):
    reason = CPP.why_not(torch.zeros(1, CHANNELS, 1, 1), 3)
    if reason:  # plain torch takes them, as BatchNorm does
        pytest.skip(reason)
    _, layer = pair(kind)
    layer.num_batches_tracked = layer.num_batches_tracked.to('meta')
    with pytest.raises(RuntimeError, match='the input is on cpu, num_batches_tracked on meta'):
        layer(torch.randn(5, CHANNELS, 6, 7))


def test_weight_taken_away_leaves_a_weight_of_one(kind):
    _, layer = pair(kind)
    with torch.no_grad():
        expected = copy.deepcopy(layer)
        expected.weight.fill_(1)
    layer.weight = None
    x = torch.randn(3, CHANNELS, 5, 5)
    torch.testing.assert_close(layer(x), expected(x))
    layer(x).square().sum().backward()
    assert layer.kernel is None or layer.kernel.grad.abs().sum() > 0


@pytest.mark.parametrize('name', ['scale_weight', 'scale_bias'])
@pytest.mark.parametrize('backend', ['torch', 'cpp'])
def test_half_of_the_scaling_is_refused(name, backend):
    layer = layers.UBN(CHANNELS, fct=None, backend=backend)
    setattr(layer, name, None)
    with pytest.raises(ValueError, match='scale_weight and scale_bias must both be None or'):
        layer(torch.randn(2, CHANNELS, 4, 4))


@pytest.mark.parametrize('training', [True, False])
def test_a_layer_first_called_in_inference_mode_trains(training):
    """As in a trial run of the shapes."""
    with torch.device('meta'):
        layer = layers.UBN(CHANNELS, backend='torch')
    layer.load_state_dict(layers.UBN(CHANNELS).state_dict(), assign=True)
    x = torch.randn(2, CHANNELS, 5, 5)
    with torch.inference_mode():
        layer.train(training)(x)
    layer.train()(x).sum().backward()
    assert layer.batch_statistics_used
    assert layer.num_batches_tracked == 1 + training


def test_half_of_the_statistics_is_refused(kind):
    for name in ('running_mean', 'running_var'):
        _, layer = pair(kind)
        setattr(layer, name, None)
        for training in (True, False):
            with pytest.raises(ValueError, match='must both be None or neither'):
                layer.train(training)(torch.randn(3, CHANNELS, 5, 5))


def test_pruned_channels(kind):
    """As pruning libraries do: tensors and num_features shrink; one that is forgotten is named."""
    _, layer = pair(kind)
    kept = torch.tensor([0, 2])
    full = copy.deepcopy(layer).eval()
    x = torch.randn(3, CHANNELS, 5, 5)
    layer.num_features = 2
    forgotten = list(layer.named_parameters())[-1][0]
    for name, value in list(layer.named_parameters()):
        if name != forgotten:
            setattr(layer, name, nn.Parameter(value.detach()[kept]))
    for name in ('running_mean', 'running_var'):
        setattr(layer, name, getattr(layer, name)[kept])
    with pytest.raises(ValueError, match=f'expected 4 channels, .*: {forgotten} has 4'):
        layer(x[:, kept])
    setattr(layer, forgotten, nn.Parameter(getattr(layer, forgotten).detach()[kept]))
    torch.testing.assert_close(layer.eval()(x[:, kept]), full(x)[:, kept])
    with pytest.raises(ValueError, match='expected 2 channels, got input size'):
        layer(x)


@pytest.mark.parametrize('gate', [dict(), dict(fct=1.0), dict(fct=1.0, fct_warmup=0)])
def test_calibration_sees_all_batches(gate):
    """update_bn, and a loop over momenta, give BatchNorm's statistics whatever the gate says."""
    batches = [torch.randn(8, CHANNELS, 6, 6) * (1 + step / 10) for step in range(40)]
    norms = nn.BatchNorm2d(CHANNELS), layers.UBN(CHANNELS, **gate)
    for norm in norms:
        norm.train()(torch.randn(8, CHANNELS, 6, 6))
        update_bn(batches, norm)
        assert norm.momentum == 0.1
    for name, expected in norms[0].named_buffers():
        torch.testing.assert_close(getattr(norms[1], name), expected, msg=name)


def test_recalibration_by_decreasing_momentum(kind):
    """The recipe before update_bn: momentum 1, 1/2, 1/3, … over the batches."""
    norms = pair(kind)
    for step in range(30):
        x = torch.randn(8, CHANNELS, 6, 6) * (1 + step / 10)
        for norm in norms:
            if step == 0:
                norm.reset_running_stats()
            norm.momentum = 1 / (step + 1)
            norm(x)
    for name, expected in norms[0].named_buffers():
        torch.testing.assert_close(getattr(norms[1], name), expected, msg=name)


def test_reset_running_stats_without_tracking_resets_nothing(kind):
    _, layer = pair(kind)
    for value in layer.buffers():
        value.fill_(2)
    layer.track_running_stats = False
    layer.reset_running_stats()
    assert all((value == 2).all() for value in layer.buffers())


@pytest.mark.parametrize('kind', [*KINDS, 'SyncUBN'])
@pytest.mark.parametrize('copied', [copy.deepcopy, lambda norm: pickle.loads(pickle.dumps(norm))])
def test_copies_are_independent_and_equal(kind, copied):
    _, layer = pair(kind)
    layer(torch.randn(5, CHANNELS, 6, 6))
    twin = copied(layer)
    x = torch.randn(5, CHANNELS, 6, 6)
    assert torch.equal(twin(x), layer(x))
    for (name, value), other in zip(layer.named_buffers(), twin.buffers()):
        assert torch.equal(value, other), name
        assert value.data_ptr() != other.data_ptr()


def test_averaged_model_and_shared_memory(kind):
    batch_norm, layer = pair(kind)
    averaged = AveragedModel(layer, use_buffers=True)
    layer.share_memory()
    assert all(value.is_shared() for value in (*layer.parameters(), *layer.buffers()))
    assert_same_steps(batch_norm, layer)
    averaged.update_parameters(layer)
    assert_same_state(averaged.module, layer)


def test_from_meta_by_to_empty_and_reset_parameters(kind):
    with torch.device('meta'):
        layer = getattr(layers, kind)(CHANNELS)
    for training in (True, False):
        layer.train(training)
        assert layer(torch.empty(2, CHANNELS, 5, 5, device='meta')).is_meta
    layer.to_empty(device='cpu')
    for value in (*layer.parameters(), *layer.buffers()):
        value.detach().fill_(float('nan') if value.is_floating_point() else 99)
    torch.manual_seed(5)
    layer.reset_parameters()
    torch.manual_seed(5)
    assert_same_state(layer, getattr(layers, kind)(CHANNELS))


def test_input_by_name(kind):
    batch_norm, layer = pair(kind)
    x = torch.randn(3, CHANNELS, 5, 5)
    torch.testing.assert_close(layer(input=x), batch_norm(input=x))


@pytest.mark.parametrize('parameters', [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    'dtype', [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.complex64]
)
def test_dtypes_are_those_of_batch_norm(parameters, dtype):
    x = torch.ones(2, CHANNELS, 3, 3).to(dtype)
    batch_norm, layer = (norm.to(parameters) for norm in pair('UBN'))
    try:
        expected = batch_norm(x).dtype
    except RuntimeError:  # NotImplementedError is one
        with pytest.raises(TypeError, match=r'mixed dtypes|expected a dense float input'):
            layer(x)
    else:
        assert layer(x).dtype == expected


@pytest.mark.parametrize('eps', [0.0, -1e-5])
def test_eps_is_positive(kind, eps):
    _, layer = pair(kind)
    layer.eps = eps
    with pytest.raises(ValueError, match='eps must be positive'):  # as torch 2.11's BatchNorm
        layer(torch.randn(2, CHANNELS, 3, 3))


def test_tensors_elsewhere_and_sparse_ones_are_refused(kind):
    _, layer = pair(kind)
    with pytest.raises(RuntimeError, match=r'the input is on cpu, .* on meta'):
        copy.deepcopy(layer).to('meta')(torch.randn(2, CHANNELS, 3, 3))
    with pytest.raises(TypeError, match='expected a dense float input'):
        layer(torch.randn(2, CHANNELS, 3, 3).to_sparse())


VECTORS = sorted({*Parameters._fields, 'running_mean', 'running_var'} - {'kernel'})


@pytest.mark.parametrize(
    ('name', 'shape'),
    [
        *((name, (CHANNELS, 2)) for name in VECTORS),
        *(('kernel', shape) for shape in ((CHANNELS, 2), (CHANNELS, 1, 1, 3), (CHANNELS, 1, 2, 2))),
        *((name, ()) for name in ('kernel', 'running_mean')),
    ],
)
def test_tensors_of_another_shape_are_refused(name, shape):
    layer = layers.UBN(CHANNELS).eval()
    wrong = torch.ones(shape)
    setattr(layer, name, nn.Parameter(wrong) if name in Parameters._fields else wrong)
    with pytest.raises(ValueError, match=f'{name} (must have the shape|has 1)'):
        layer(torch.randn(2, CHANNELS, 5, 5))


@pytest.mark.newer_torch('DTensor is a prototype there', than='2.4')
@pytest.mark.usefixtures('one_process')
def test_distributed_parameters_with_a_plain_input_are_refused(kind):
    tensor = pytest.importorskip('torch.distributed.tensor')
    mesh = tensor.init_device_mesh('cpu', (1,))
    layer = getattr(layers, kind)(CHANNELS)
    for name, value in list(layer.named_parameters()):
        there = tensor.distribute_tensor(value.detach(), mesh, [tensor.Replicate()])
        layer.register_parameter(name, nn.Parameter(there))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r'mixed torch\.Tensor and DTensor'):
            layer(torch.randn(2, CHANNELS, 5, 5))
        layer.eval()


@pytest.mark.parametrize('kind', [*KINDS, 'SyncUBN'])
def test_one_value_a_channel_has_no_statistics(kind):
    for norm in pair(kind):
        for change in (nn.Module.train, torch.func.replace_all_batch_norm_modules_, nn.Module.eval):
            change(norm)
            with pytest.raises(ValueError, match='Expected more than 1 value per channel'):
                norm(torch.randn(1, CHANNELS, 1, 1))


def test_statistics_that_want_a_gradient_are_refused(kind):
    """BatchNorm has none for them, and none is no zero."""
    _, layer = pair(kind)
    layer.eval().running_mean.requires_grad_()
    with pytest.raises(RuntimeError, match='take no gradient'):
        layer(torch.randn(2, CHANNELS, 3, 3))


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        ('fct', False),
        ('fct', float('nan')),
        ('fct', 2),
        ('fct', '0.1'),
        ('fct_momentum', 2),
        ('fct_momentum', True),
        ('fct_warmup', 0.5),
        ('fct_warmup', 'yes'),
        ('fct_warmup', float('inf')),
        ('fct_warmup', -1),
        ('fct_interval', 0),
        ('fct_interval', True),
        ('fct_stride', 1.5),
    ],
)
def test_settings_of_the_gate_are_checked_whenever_they_are_set(name, value):
    layer = layers.UBN(CHANNELS)
    before = getattr(layer, name)
    with pytest.raises(ValueError, match=f'{name} (is|must|counts)'):
        setattr(layer, name, value)
    assert getattr(layer, name) == before
    with pytest.raises(ValueError, match=f'{name} (is|must|counts)'):
        layers.UBN(CHANNELS, **{name: value})


@pytest.mark.parametrize('backend', ['auto', 'torch'])
def test_a_warmup_written_as_a_float(backend):
    layer = layers.UBN(CHANNELS, fct=1, fct_warmup=1e3, backend=backend)
    layer(torch.randn(5, CHANNELS, 6, 7))
    assert layer.batch_statistics_used


def test_a_lazy_minus_sign(kind):
    batch_norm, layer = pair(kind)
    x = torch.randn(5, CHANNELS, 6, 7)
    upstream = torch.randn_like(x)
    for norm in (batch_norm, layer):
        given = torch._neg_view(x).requires_grad_()
        y = norm(given)
        grad = torch.autograd.grad(y, given, torch._neg_view(upstream))
        norm.found = y, *grad
    torch.testing.assert_close(layer.found, batch_norm.found)


@pytest.mark.parametrize('name', ['center', 'scale'])
@pytest.mark.parametrize('value', [0.15, None, 'False'])
def test_switches_are_switches(name, value):
    with pytest.raises(TypeError, match=f'{name} must be True or False'):
        layers.UBN(CHANNELS, **{name: value})

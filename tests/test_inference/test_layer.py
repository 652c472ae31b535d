"""What is left of a layer, with and without a convolution before it, is the layer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from of_inference import HALF, KINDS
from torch import nn
from weights import difference, trained

import mmubn
from mmubn.inference.layer import InferenceNorm, constants_of, fold
from mmubn.ops import reference

SETTINGS = [
    *(dict(type=kind) for kind in KINDS),
    dict(type='UBN', center=False),
    dict(type='UBN', scale=False),
    dict(type='UBN', kernel_size=1),
    dict(type='UBN', kernel_size=5),
    dict(type='UBN', affine=False),
    dict(type='UBN', kernel_size=1, center=False, scale=False),
    dict(type='UBN', center=False, scale=False),
]


def make_layer(channels: int = 6, **norm_cfg) -> nn.Module:
    norm_cfg = dict(norm_cfg)
    return trained(getattr(mmubn, norm_cfg.pop('type'))(channels, **norm_cfg))


def literal(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The equations as they stand, in float64."""
    output, _ = reference.ubn_step(
        x.double(),
        {name: value.detach().double() for name, value in norm.named_parameters()},
        {name: value.double() for name, value in norm.named_buffers()},
        training=False,
        eps=float(norm.eps),
        scale_from_input=norm._scale_from_input,
    )
    return output


def run(constants, v: torch.Tensor) -> torch.Tensor:
    if constants is None:
        return v
    return InferenceNorm(constants, v.dtype, owns_input=False)(v)


def folded(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    part, constants = fold(norm)
    v = part.scale.view(1, -1, 1, 1) * x.double() + part.offset.view(1, -1, 1, 1)
    return run(constants, v)


@pytest.mark.parametrize('norm_cfg', SETTINGS, ids=str)
def test_equals_the_equations(norm_cfg):
    norm = make_layer(**norm_cfg)
    x = torch.randn(3, 6, 7, 5) + torch.randn(3, 6, 1, 1)
    expected = literal(norm, x)
    assert difference(run(constants_of(norm), x.double()), expected) < 1e-12
    assert difference(folded(norm, x), expected) < 1e-12
    assert difference(run(constants_of(norm), x), expected) < 2e-6


def test_another_type_that_scales_from_its_input():
    class InputScaledRBN(mmubn.RBN):
        _scale_from_input = True

    norm, x = trained(InputScaledRBN(6)), torch.randn(3, 6, 7, 5) + torch.randn(3, 6, 1, 1)
    assert difference(run(constants_of(norm), x.double()), literal(norm, x)) < 1e-12
    assert difference(folded(norm, x), literal(norm, x)) < 1e-12


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(('UBN', 'RBN', 'IEBN')),
    center=st.sampled_from((0.0, -1.0, -0.6, -1.0 + 1e-6, 3.0)),
    weight=st.sampled_from((0.0, -1.0, 1e-40, 1e-20, 50.0)),
    mean=st.sampled_from((0.0, 1e3)),
    var=st.sampled_from((0.0, 1e-12, 1e4)),
)
def test_extreme_parameters(kind, center, weight, mean, var):
    """A channel whose gamma is 0, whose mean cancels, whose variance is nothing: still exact."""
    norm = make_layer(4, type=kind)
    with torch.no_grad():
        norm.weight[1] = weight
        norm.running_mean[2], norm.running_var[2] = mean, var
        if kind != 'IEBN':
            norm.center_weight[:2] = center
    x = torch.randn(2, 4, 5, 5)
    expected, actual = literal(norm, x), folded(norm, x)
    scale = expected.abs().amax((0, 2, 3), keepdim=True) + 1e-30
    assert actual.isfinite().all()
    assert ((actual - expected) / scale).abs().max() < 1e-9


def test_what_does_nothing_is_left_out():
    """A calibration that is zero, taps that are zero beside the middle."""
    norm = make_layer(type='UBN')
    with torch.no_grad():
        norm.center_weight.zero_()
    constants = constants_of(norm)
    assert constants.center_weight is None
    assert constants.scale_weight is not None
    with torch.no_grad():
        norm.scale_weight.zero_()
        middle = norm.kernel[..., 1, 1].clone()
        norm.kernel.zero_()[..., 1, 1] = middle
    x = torch.randn(2, 6, 4, 4)
    assert fold(norm)[1] is None
    assert difference(folded(norm, x), literal(norm, x)) < 1e-12
    assert constants_of(norm).kernel_size == 1


@pytest.mark.newer_torch('no float16 on a CPU')
@pytest.mark.parametrize('gamma', [0.0, 1e-33, 1e-9, 1e-6, 1e-3])
def test_small_weights_stay_in_the_range_of_float16(gamma):
    """As weight decay leaves them: what an image adds to the convolution is divided by them."""
    norm = make_layer(type='RBN')
    with torch.no_grad():
        norm.weight[0] = gamma
    x = torch.randn(2, 6, 4, 4)
    part, constants = fold(norm)
    v = part.scale.view(1, -1, 1, 1) * x.double() + part.offset.view(1, -1, 1, 1)
    y = InferenceNorm(constants, torch.float16, owns_input=False)(v.half())
    assert difference(y.double(), literal(norm, x)) < 5e-3


@pytest.mark.parametrize('dtype', [torch.bfloat16, HALF])
@pytest.mark.parametrize('kind', KINDS)
def test_half_precision_errs_no_more_than_rounding(kind, dtype):
    """At most twice the error of the exact output rounded at the places where V and Y are."""
    norm = make_layer(16, type=kind)
    x = torch.randn(4, 16, 14, 14)
    expected = literal(norm, x)
    part, constants = fold(norm)
    v = part.scale.view(1, -1, 1, 1) * x.double() + part.offset.view(1, -1, 1, 1)
    rounded = run(constants, v.to(dtype).double()).to(dtype)
    actual = InferenceNorm(constants, dtype, owns_input=False)(v.to(dtype))
    assert actual.dtype == dtype
    error = (actual.double() - expected).square().mean().sqrt()
    assert error < 3 * (rounded.double() - expected).square().mean().sqrt()


@pytest.mark.parametrize('kind', KINDS)
def test_overwrites_its_input_only_where_it_may(kind):
    _, constants = fold(make_layer(type=kind))
    x = torch.randn(2, 6, 5, 5)
    kept = x.clone()
    expected = InferenceNorm(constants, x.dtype, owns_input=False)(x)
    assert torch.equal(x, kept)
    layer = InferenceNorm(constants, x.dtype, owns_input=True)
    wants_gradient = x.clone().requires_grad_()
    output = layer(wants_gradient)
    output.backward(torch.randn_like(output))
    assert torch.equal(wants_gradient, kept)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(layer(x.clone()), expected)


@pytest.mark.parametrize('kind', KINDS)
def test_channels_last_stays(kind):
    norm = make_layer(8, type=kind)
    x = torch.randn(2, 8, 6, 5).to(memory_format=torch.channels_last)
    output = InferenceNorm(constants_of(norm), x.dtype, owns_input=False)(x)
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert difference(output, literal(norm, x)) < 2e-6

"""What the FLOP counters say of the layers."""

import importlib

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import mmubn

pytest.importorskip('mmengine')

from mmengine.analysis import ActivationAnalyzer, FlopAnalyzer

N = 2 * 8 * 14 * 14  # numbers in the output
CONV = 3 * 9 * N
# Of the norm layer, flops and activations by N. BatchNorm has 2 in evaluation, 5 in training.
LAYERS = [
    (nn.BatchNorm2d(8), 2, 5, 0),
    (mmubn.UBN(8), 1 + 1 + 9, 1 + 4 + 9, 1),
    (mmubn.SyncUBN(8, kernel_size=5), 1 + 1 + 25, 1 + 4 + 25, 1),
    (mmubn.UBN(8, kernel_size=1, center=False, scale=False), 2, 5, 0),
    (mmubn.RBN(8), 3, 6, 0),
    (mmubn.BNET(8), 1 + 9, 4 + 9, 1),
    (mmubn.IEBN(8), 3, 6, 0),
]


def net(norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), norm)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16)


def counters():
    yield FlopAnalyzer, ActivationAnalyzer
    if importlib.util.find_spec('fvcore') is not None:
        fvcore = importlib.import_module('fvcore.nn')
        importlib.import_module('mmubn.flops').register_fvcore()
        yield fvcore.FlopCountAnalysis, fvcore.ActivationCountAnalysis


@pytest.mark.parametrize(('norm', 'evaluating', 'training', 'activations'), LAYERS)
def test_each_layer_costs_what_its_formula_says(x, norm, evaluating, training, activations):
    model = net(norm)
    for flops, activation in counters():
        for mode, expected in ((False, evaluating), (True, training)):
            model.train(mode)
            found = flops(model, x).unsupported_ops_warnings(False)
            assert found.total() == CONV + expected * N
            assert found.by_module()['1'] == expected * N
        found = activation(model, x).unsupported_ops_warnings(False)
        assert found.total() == (1 + activations) * N


def test_counting_leaves_the_model_as_it_was(x):
    model = net(mmubn.UBN(8)).eval()
    expected = model(x)
    FlopAnalyzer(model, x).unsupported_ops_warnings(False).total()
    assert 'forward' not in vars(model[1])
    assert torch.equal(model(x), expected)


def test_a_forward_that_was_put_on_the_layer_is_counted_and_stays(x):
    model = net(mmubn.UBN(8)).eval()
    forward = model[1].forward
    model[1].forward = own = lambda x: 3 * forward(x)
    for flops, _ in counters():
        assert flops(model, x).unsupported_ops_warnings(False).by_module()['1'] == 11 * N
        assert model[1].forward is own


def test_torch_counts_the_convolution(x):
    for norm, multiplications in ((nn.BatchNorm2d(8), 0), (mmubn.UBN(8, backend='torch'), 9 * N)):
        with FlopCounterMode(display=False) as counter:
            net(norm).eval()(x)
        assert counter.get_total_flops() == 2 * (CONV + multiplications)

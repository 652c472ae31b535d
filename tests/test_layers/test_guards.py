"""Silent replacement by another norm is refused; everything else that BatchNorm takes passes."""

import copy
import inspect
import pickle

import pytest
import timm
import torch
from own_forward import ActivatedUBN, with_forward
from timm.layers import BatchNormAct2d, convert_splitbn_model
from timm.layers import convert_sync_batchnorm as timm_convert_sync_batchnorm
from torch import nn
from torch.ao.quantization import default_qconfig, get_default_qconfig_mapping, quantize_dynamic
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torch.fx.experimental.optimization import fuse
from torchvision.models.feature_extraction import create_feature_extractor
from weights import assert_same_state, trained

import mmubn
from mmubn import layers


@pytest.fixture(params=layers.__all__)
def norm(request):
    layer = getattr(layers, request.param)(4)
    layer(torch.randn(6, 4, 5, 5))
    return layer.eval()


@pytest.fixture
def net(norm):
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Flatten(), nn.Linear(4 * 36, 2)).eval()


CONVERTERS = {
    'torch': nn.SyncBatchNorm.convert_sync_batchnorm,
    'timm': timm_convert_sync_batchnorm,
    'timm split': convert_splitbn_model,
}


@pytest.mark.parametrize('convert', CONVERTERS.values(), ids=CONVERTERS)
def test_converters_are_caught(net, convert):
    with pytest.raises(RuntimeError, match=rf'{type(net[1]).__name__} cannot become S\w+Norm'):
        convert(copy.deepcopy(net))


def test_a_converter_is_caught_where_there_is_no_weight():
    with pytest.raises(RuntimeError, match='UBN cannot become SyncBatchNorm'):
        nn.SyncBatchNorm.convert_sync_batchnorm(layers.UBN(4, affine=False))


@pytest.mark.usefixtures('one_process')  # else mmcv's SyncBatchNorm cannot be built
def test_mmengine_converters_are_caught(net):
    model = pytest.importorskip('mmengine.model')
    pytest.importorskip('mmcv.ops')
    for implementation in ('torch', 'mmcv'):
        with pytest.raises(RuntimeError, match='cannot become SyncBatchNorm') as caught:
            model.convert_sync_batchnorm(copy.deepcopy(net), implementation)
        assert "mmubn.convert_norm(model, dict(type='SyncUBN'))" in str(caught.value)
        assert "norm_cfg=dict(type='SyncUBN')" in str(caught.value)
    reverted = model.revert_sync_batchnorm(nn.Sequential(copy.deepcopy(net), nn.SyncBatchNorm(3)))
    assert type(reverted[0][1]) is type(net[1])
    assert not isinstance(reverted[1], nn.SyncBatchNorm)


def test_a_converter_of_ones_own_is_caught(norm):
    """As apex and many a repository have it: an instance of _BatchNorm, another class."""

    class MyBN(nn.BatchNorm2d):
        pass

    new = MyBN(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    new.running_mean = norm.running_mean  # sharing one tensor is no replacement
    with pytest.raises(RuntimeError, match='cannot become MyBN'):
        new.running_var = norm.running_var


def test_fusers_are_caught(net):
    with pytest.raises(RuntimeError, match='cannot be fused into a convolution') as caught:
        nn.utils.fuse_conv_bn_eval(net[0], net[1])
    assert 'fold by mmubn.prepare_for_inference(model)' in str(caught.value)
    with pytest.raises(RuntimeError, match='cannot be fused into a convolution'):
        net[1].eps + net[1].running_var
    for add in (lambda var, eps: var + eps, lambda var, eps: eps + var):
        with pytest.raises(RuntimeError, match='cannot be fused into a convolution'):
            add(net[1].running_var.numpy(), net[1].eps)
    cnn = pytest.importorskip('mmcv.cnn')
    with pytest.raises(RuntimeError, match='cannot be fused into a convolution'):
        cnn.fuse_conv_bn(copy.deepcopy(net))


def test_timm_and_torch_leave_other_types_alone(net):
    """Passes that look for BatchNorm2d itself find none."""
    before = net(torch.ones(2, 3, 8, 8))
    for change in (timm.utils.model.freeze_batch_norm_2d, fuse):
        changed = change(copy.deepcopy(net))
        torch.testing.assert_close(changed(torch.ones(2, 3, 8, 8)), before)


def test_eps_is_a_number(norm):
    assert type(norm.eps) is float
    assert dict(inspect.getmembers(norm))['eps'] == 1e-5
    norm.eps = torch.tensor(1e-3)
    assert norm.eps == float(torch.tensor(1e-3))


def test_eps_beside_the_running_variance_is_a_number_but_for_addition(norm):
    var, eps = norm.running_var, norm.eps
    assert eps == 1e-5
    assert type(pickle.loads(pickle.dumps(eps))) is float
    torch.testing.assert_close(var * eps, var * 1e-5)
    torch.testing.assert_close(torch.clamp(var, min=eps), var)
    torch.testing.assert_close(torch.full_like(var, eps), torch.full_like(var, 1e-5))
    torch.testing.assert_close(var + float(eps), var + 1e-5)
    torch.testing.assert_close(torch.from_numpy(var.numpy() * eps), var * 1e-5)
    torch.testing.assert_close(torch.from_numpy(eps * var.numpy()), var * 1e-5)


def test_other_layers_are_quantized(net):
    x = torch.randn(2, 3, 8, 8)
    expected = net(x)
    dynamic = quantize_dynamic(net, {nn.Linear})
    assert type(dynamic[3]) is not nn.Linear
    assert (dynamic(x) - expected).abs().max() < 0.1
    eager = copy.deepcopy(net)
    eager[3].qconfig = default_qconfig
    torch.ao.quantization.prepare(eager, inplace=True)
    prepared = prepare_fx(copy.deepcopy(net), get_default_qconfig_mapping(), (x,))
    prepared(x)
    assert (convert_fx(prepared)(x) - expected).abs().max() < 0.2


def test_it_is_a_leaf_of_a_symbolic_trace(net):
    x = torch.randn(2, 3, 8, 8)
    traced = torch.fx.symbolic_trace(net)
    assert [node.target for node in traced.graph.nodes if node.op == 'call_module'][1] == '1'
    assert torch.equal(traced(x), net(x))
    extractor = create_feature_extractor(net, ['1'])
    assert torch.equal(extractor(x)['1'], net[1](net[0](x)))


def test_what_surrounds_forward_runs_once_after_a_symbolic_trace(net, norm):
    """Hooks, a forward of one's own, and the activation of a fused layer of timm."""
    norm.register_forward_pre_hook(lambda layer, args: 2 * args[0])
    norm.register_forward_hook(lambda layer, args, output: output + 1)
    with_forward(norm)
    net.append(nn.Unflatten(1, (2, 1, 1))).append(trained(ActivatedUBN(2)))
    fused = nn.Sequential(BatchNormAct2d(3, act_layer=nn.SiLU))
    net.insert(0, mmubn.convert_norm(trained(fused), dict(type=type(norm).__name__)))
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(torch.fx.symbolic_trace(net)(x), net(x))


class Gained(layers.UBN):
    def forward(self, x, gain, shift=0.0):
        return gain * super().forward(x) + shift


class Gains(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = Gained(3)

    def forward(self, x):
        return self.norm(x, x.mean(), shift=2.0)


def test_a_leaf_keeps_all_its_arguments():
    net, x = trained(Gains()), torch.randn(2, 3, 8, 8)
    assert torch.equal(torch.fx.symbolic_trace(net)(x), net(x))


def test_scripting_is_refused_in_one_line_and_tracing_saves(net, tmp_path):
    with pytest.raises(
        RuntimeError, match=r'^torch\.jit\.script cannot compile .*torch\.jit\.trace'
    ):
        torch.jit.script(net)
    x = torch.randn(2, 3, 8, 8)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            torch.jit.trace(net, x).save(tmp_path / 'net.pt')
        loaded = torch.jit.load(tmp_path / 'net.pt')
        other = torch.randn(3, 3, 8, 8)
        torch.testing.assert_close(loaded(other), net(other))
    with torch.inference_mode():
        torch.testing.assert_close(torch.jit.freeze(loaded)(x), net(x))


def test_tracing_in_training_moves_the_statistics(norm):
    twin = copy.deepcopy(norm).train()
    traced = torch.jit.trace(
        copy.deepcopy(norm).train(), torch.randn(6, 4, 5, 5), check_trace=False
    )
    for name, value in norm.state_dict().items():  # as before the trace
        traced.state_dict()[name].copy_(value)
    for _ in range(3):
        x = torch.randn(6, 4, 5, 5)
        found, expected = traced(x), twin(x)
        torch.testing.assert_close(found, expected)
        # A second step has no gradient into the first one's statistics.
        found.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(dict(traced.named_parameters())['weight'].grad, twin.weight.grad)
    assert_same_state(traced.state_dict(), twin, rtol=1e-5, atol=1e-6)

"""Whole models: the same outputs, a report, and one line for what cannot be prepared."""

import copy
import logging
import types

import pytest
import timm
import torch
import torchvision
from of_inference import HALF, KINDS
from own_forward import ActivatedUBN, with_forward
from torch import nn
from torch.nn.utils import prune
from weights import assert_same_state, difference, trained

import mmubn
from mmubn import layers, prepare_for_inference
from mmubn.inference.layer import InferenceNorm


def network(kind: str = 'UBN') -> nn.Module:
    model = torchvision.models.resnet18()
    if kind != 'BN':
        mmubn.convert_norm(model, dict(type=kind))
    return trained(model, 0.1)


def modules_of(model: nn.Module, kind: type) -> list:
    return [module for module in model.modules() if isinstance(module, kind)]


@pytest.mark.parametrize(
    ('kind', 'left'),
    [
        ('UBN', 'offset, factor, convolution'),
        ('SyncUBN', 'offset, factor, convolution'),
        ('RBN', 'offset, factor'),
        ('BNET', 'convolution'),
        ('IEBN', 'factor'),
        ('BN', 'nothing'),
    ],
)
def test_outputs_are_the_models(kind, left):
    model = network(kind)
    state = copy.deepcopy(model.state_dict())
    prepared = prepare_for_inference(model)
    x = torch.randn(2, 3, 64, 48)
    assert difference(prepared(x), model(x)) < 1e-5
    assert all(layer.convolution for layer in prepared.inference_report)
    assert {layer.left for layer in prepared.inference_report} == {left}
    assert len(modules_of(prepared, nn.Conv2d)) == (40 if 'convolution' in left else 20)
    assert not any(p.requires_grad for p in prepared.parameters())
    # The model given is as it was, and shares nothing with the copy.
    assert all(p.requires_grad for p in model.parameters())
    assert_same_state(model, state)
    with torch.no_grad():
        prepared.fc.weight.zero_()
    assert model.fc.weight.any()


def test_resnet50_of_timm():
    model = timm.create_model('resnet50')
    model = trained(mmubn.convert_norm(model, dict(type='UBN')), 0.1)
    prepared = prepare_for_inference(model)
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        assert difference(prepared(x), model(x)) < 1e-5
    assert len(prepared.inference_report) == 53


@pytest.mark.parametrize('kind', KINDS)
def test_converted_and_not_trained_is_the_fused_batch_norm_network(kind):
    norm_cfg = dict(type=kind)
    if kind == 'BNET':  # starts as published, with random taps, unless told otherwise
        norm_cfg['kernel_init'] = 'identity'
    bn = network('BN')
    prepared = prepare_for_inference(mmubn.convert_norm(copy.deepcopy(bn), norm_cfg).eval())
    fused = prepare_for_inference(bn)
    assert {layer.left for layer in prepared.inference_report} == {'nothing'}
    state = fused.state_dict()
    for name, value in prepared.state_dict().items():
        assert difference(value, state[name]) < 1e-6, name


@pytest.mark.parametrize(
    'name', ['efficientnet_b0', 'densenet121', 'resnetv2_50', 'hrnet_w18_small']
)
def test_networks_of_timm(name):
    """Fused activations, norms before convolutions, concatenation, many branches."""
    model = timm.create_model(name)
    model = trained(mmubn.convert_norm(model, dict(type='UBN')), 0.05)
    prepared = prepare_for_inference(model)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert difference(prepared(x), model(x)) < 1e-5
    reasons = {layer.reason for layer in prepared.inference_report if not layer.convolution}
    assert reasons <= {'it does not follow a convolution'}
    assert (not reasons) == (name not in ('densenet121', 'resnetv2_50'))


def test_norms_without_a_convolution_stand_alone():
    model = nn.Sequential(
        nn.ReLU(), mmubn.UBN(4), nn.ReLU(), mmubn.BNET(4), nn.ReLU(), nn.BatchNorm2d(4)
    )
    model.append(mmubn.UBN(4, kernel_size=1, center=False, scale=False))
    trained(model)
    prepared = prepare_for_inference(model)
    x = torch.randn(2, 4, 6, 6)
    kept = x.clone()
    assert difference(prepared(x), model(x)) < 2e-6
    assert torch.equal(x, kept)
    assert [type(prepared[i]) for i in (1, 3, 5, 6)] == [
        *(InferenceNorm, InferenceNorm, nn.BatchNorm2d, nn.BatchNorm2d)
    ]


@pytest.mark.parametrize(
    ('norm', 'reason'),
    [
        (ActivatedUBN(4), 'ActivatedUBN has a forward of its own, which would be lost'),
        (with_forward(mmubn.UBN(4)), 'its forward was replaced on the layer, which would be lost'),
    ],
)
def test_a_layer_that_computes_more_stays(norm, reason):
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), norm))
    prepared = prepare_for_inference(model)
    x = torch.randn(2, 3, 6, 6)
    assert difference(prepared(x), model(x)) < 2e-6
    assert prepared.inference_report[0].reason == reason


def test_batch_norm_over_vectors_stays():
    model = trained(nn.Sequential(nn.Linear(4, 8), nn.SyncBatchNorm(8)))
    x = torch.randn(5, 4)
    assert torch.equal(prepare_for_inference(model)(x), model(x))


def test_a_layer_by_itself():
    model = trained(mmubn.UBN(4))
    prepared = prepare_for_inference(model)
    x = torch.randn(2, 4, 6, 6)
    assert type(prepared) is InferenceNorm
    assert difference(prepared(x), model(x)) < 2e-6
    assert prepared.inference_report[0].kind == 'UBN'


def test_report_and_log(caplog):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), mmubn.UBN(4), nn.ReLU(), mmubn.RBN(4))
    with caplog.at_level(logging.INFO, 'mmubn'):
        prepared = prepare_for_inference(trained(model))
    lines = [
        '1 (UBN): into 0; left: offset, factor, convolution',
        '3 (RBN): not folded: it does not follow a convolution; left: offset, factor',
    ]
    assert [str(layer) for layer in prepared.inference_report] == lines
    assert caplog.messages[:2] == lines
    assert caplog.messages[2] == (
        'prepared 2 norm layers for inference: 1 folded into the convolution before; '
        '1 not: it does not follow a convolution'
    )


def test_saved_and_loaded_whole(tmp_path):
    prepared = prepare_for_inference(network())
    torch.save(prepared, tmp_path / 'prepared.pt')
    x = torch.randn(1, 3, 32, 32)
    loaded = torch.load(tmp_path / 'prepared.pt', weights_only=False)
    assert torch.equal(loaded(x), prepared(x))


@pytest.mark.parametrize('dtype', [torch.bfloat16, HALF])
@pytest.mark.parametrize('kind', ['UBN', 'RBN'])
def test_half_precision(kind, dtype):
    """The prepared network errs no more than the network itself does in that dtype."""
    model = network(kind)
    prepared = prepare_for_inference(model)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        itself = difference(copy.deepcopy(model).to(dtype)(x.to(dtype)), expected)
        actual = copy.deepcopy(prepared).to(dtype)(x.to(dtype))
        assert actual.dtype == dtype
        assert difference(actual, expected) < 1.5 * itself
        with torch.autocast('cpu', dtype):
            assert difference(prepared(x), expected) < 1.5 * itself


def test_channels_last_and_double():
    model = network()
    prepared = prepare_for_inference(model)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        last = torch.channels_last
        assert (
            difference(prepared.to(memory_format=last)(x.to(memory_format=last)), expected) < 1e-5
        )
        kept = prepare_for_inference(model.to(memory_format=last))
        assert kept.layer1[0].conv1.weight.is_contiguous(memory_format=last)
        exact = prepare_for_inference(model.double())
        assert difference(exact(x.double()), model(x.double())) < 1e-12


@pytest.mark.parametrize('kind', KINDS)
def test_float64(kind):
    """What is folded has the dtype of the layer's own tensors, which no other layer may take."""
    model = trained(nn.Sequential(nn.Conv2d(3, 8, 3), getattr(mmubn, kind)(8))).double()
    prepared = prepare_for_inference(model)
    x = torch.randn(2, 3, 8, 8).double()
    with torch.no_grad():
        assert difference(prepared(x), model(x)) < 1e-13


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kind', ['UBN', 'RBN', 'IEBN'])
def test_compiled_in_one_graph(kind):
    torch._dynamo.reset()
    layers = [getattr(mmubn, kind)(8), nn.ReLU(), getattr(mmubn, kind)(8)]
    model = trained(nn.Sequential(nn.Conv2d(3, 8, 3), *layers))
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        compiled = torch.compile(prepare_for_inference(model), fullgraph=True, backend='aot_eager')
        assert difference(compiled(x), model(x)) < 1e-5


def on_two_devices():
    model = network()
    model.fc.to('meta')
    return model


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: network().train(), 'the model is in training mode: call model.eval() first'),
        (
            lambda: (m := network(), m.layer1[0].bn1.train())[0],
            'layer1.0.bn1 is in training mode: call model.eval() first',
        ),
        (
            lambda: torch.compile(network()),
            'the model is compiled: prepare it first, then compile what you get',
        ),
        (
            lambda: (m := network(), m.layer1.compile())[0],
            'the model (layer1) is compiled: prepare it first, then compile what you get',
        ),
        (
            lambda: torch.jit.trace(nn.BatchNorm2d(3).eval(), torch.randn(1, 3, 4, 4)),
            'the model is a TorchScript module: prepare the module it was made of',
        ),
        (
            lambda: nn.DataParallel(network()).eval(),
            'the model is wrapped in DataParallel: pass its .module',
        ),
        (
            lambda: prepare_for_inference(network('BN')),
            'the model is prepared for inference already',
        ),
        (
            lambda: nn.Sequential(prepare_for_inference(network())).eval(),
            'the model is prepared for inference already',
        ),
        (on_two_devices, 'the model is on cpu and meta: move it to one device with data'),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.GroupNorm(1, 3)).eval(),
            f'the model has no norm layer to prepare: no {", ".join(layers.__all__)}, BatchNorm2d',
        ),
    ],
)
def test_refuses_in_one_line(make, message):
    model = make()
    with pytest.raises(ValueError, match=r'^[^\n]+$') as caught:
        prepare_for_inference(model)
    assert str(caught.value) == message


def pruned():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), mmubn.UBN(4))
    for conv in (model[0], model[2]):
        prune.random_unstructured(conv, 'weight', amount=0.5)
    model.eval()(torch.randn(1, 3, 4, 4))
    return model


def test_refuses_a_pruned_model_with_both_remedies():
    x = torch.randn(2, 3, 4, 4)
    for remedy in ('remove', 'no_grad'):
        model = pruned()
        with pytest.raises(ValueError, match='make pruning permanent') as caught:
            prepare_for_inference(model)
        assert '\n' not in str(caught.value)
        if remedy == 'remove':
            prune.remove(model[0], 'weight')
            prune.remove(model[2], 'weight')
        with torch.no_grad():
            expected = model(x)
            prepared = prepare_for_inference(model)
            assert difference(prepared(x), expected) < 1e-5
        folded = [bool(layer.convolution) for layer in prepared.inference_report]
        assert folded == [remedy == 'remove'] * 2


def test_refuses_examples_on_another_device():
    with pytest.raises(ValueError, match=r'^example_inputs are on meta, the model is on cpu$'):
        prepare_for_inference(network(), (torch.randn(1, 3, 32, 32, device='meta'),))


def test_a_forward_replaced_on_the_model_itself():
    """It reads the convolution once more; torch.fx would read that of the class."""
    model = network()
    model.forward = types.MethodType(
        lambda self, x: type(self).forward(self, x) + self.conv1(x).mean(), model
    )
    x = torch.rand(2, 3, 64, 64)
    prepared = prepare_for_inference(model)
    assert not prepared.inference_report[0].convolution
    torch.testing.assert_close(prepared(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('kind', ['UBN', 'BNET', 'RBN'])
def test_planes_without_rows(kind):
    model = trained(nn.Sequential(getattr(layers, kind)(4)))
    prepared, x = prepare_for_inference(model), torch.rand(2, 4, 0, 3)
    assert torch.equal(prepared(x), model(x))


def test_one_tensor_is_one_argument():
    model = network()
    prepared = prepare_for_inference(model, torch.rand(2, 3, 64, 64))
    assert all(layer.convolution for layer in prepared.inference_report)
    with pytest.raises(TypeError, match='a tuple of positional arguments, or a tensor, got dict'):
        prepare_for_inference(model, dict(x=torch.rand(2, 3, 64, 64)))


@pytest.mark.parametrize('strict', [True, False])
def test_refuses_the_state_of_the_model_before(strict, tmp_path):
    """Loaded as far as names agree, it would give another network."""
    model = network()
    prepared = prepare_for_inference(model)
    own = copy.deepcopy(prepared.state_dict())
    torch.save(prepared, tmp_path / 'prepared.pt')  # with what refuses
    prepared = torch.load(tmp_path / 'prepared.pt', weights_only=False)
    with pytest.raises(ValueError, match=r'^bn1.bias has no place in this prepared model'):
        prepared.load_state_dict(model.state_dict(), strict=strict)
    assert_same_state(prepared, own)  # refused before anything was loaded
    part = {k[7:]: v for k, v in model.state_dict().items() if k.startswith('layer1.')}
    with pytest.raises(ValueError, match=r'^0\.bn1\.bias has no place'):
        prepared.layer1.load_state_dict(part, strict=strict)
    prepared.load_state_dict(own)
    assert_same_state(prepared, own)


@pytest.mark.parametrize('kind', ['UBN', 'RBN', 'BNET'])
@pytest.mark.parametrize('shape', [(1, 9, 6, 6), (1, 1, 6, 6), (8, 6, 6), (1, 8, 6, 6, 6)])
def test_another_shape_is_refused(kind, shape):
    """The C++ would read beyond it."""
    prepared = prepare_for_inference(trained(getattr(layers, kind)(8)))
    with pytest.raises(ValueError, match=r'expected an input of shape \(N, 8, H, W\), got'):
        prepared(torch.ones(shape))


def test_a_symbolic_trace_takes_its_layers_as_one():
    prepared = prepare_for_inference(network())
    traced = torch.fx.symbolic_trace(prepared)
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(traced(x), prepared(x))
    with pytest.raises(RuntimeError, match='cannot compile InferenceNorm: use '):
        torch.jit.script(prepared)

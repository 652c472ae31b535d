"""State dicts: BatchNorm's into each layer, each layer's into itself."""

import copy
import logging

import pytest
import torch
import torchvision
from against_reference import randomize
from torch import nn
from weights import assert_same_state, difference, trained

from mmubn import layers
from mmubn.layers import UBN

LAYERS = [getattr(layers, name) for name in layers.__all__ if name != 'SyncUBN']


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_batch_norm_keeps_its_outputs(make_layer, dtype):
    bn = trained(nn.BatchNorm2d(6, dtype=dtype))
    layer = make_layer(6, dtype=dtype)
    randomize(layer)  # whatever was there must go
    if isinstance(layer, UBN):
        layer.running_similarity.fill_(-0.2)
    assert not any(layer.load_state_dict(bn.state_dict()))
    x = torch.randn(4, 6, 5, 7, dtype=dtype) * 3
    torch.testing.assert_close(layer.eval()(x), bn(x))
    assert layer.num_batches_tracked == 1000
    assert getattr(layer, 'running_similarity', 1) == 1


@pytest.mark.parametrize('layer', LAYERS)
def test_batch_norm_without_affine_keeps_its_outputs(layer):
    bn = trained(nn.BatchNorm2d(6, affine=False))
    norm = layer(6, affine=False)
    norm.load_state_dict(bn.state_dict())
    x = torch.randn(4, 6, 5, 7)
    torch.testing.assert_close(norm.eval()(x), bn(x))


@pytest.mark.parametrize('layer', LAYERS)
@pytest.mark.parametrize('bias', [True, False])
def test_batch_norm_without_bias_keeps_its_outputs(layer, bias):
    bn = trained(nn.BatchNorm2d(6))
    bn.bias = None
    state = {name: value for name, value in bn.state_dict().items() if value is not None}
    for given in (state, bn.state_dict()):  # without and with the version of what wrote it
        norm = layer(6, bias=bias)
        randomize(norm)
        assert not any(norm.load_state_dict(given))
        x = torch.randn(4, 6, 5, 7)
        torch.testing.assert_close(norm.eval()(x), bn(x))


@torch.no_grad()
def test_torchvision_resnet18_keeps_its_outputs():
    bn = trained(torchvision.models.resnet18(weights=None))
    network = torchvision.models.resnet18(weights=None, norm_layer=UBN)
    assert not any(network.load_state_dict(bn.state_dict()))
    x = torch.randn(2, 3, 64, 64)
    assert difference(network.eval()(x), bn(x)) <= 1e-5


def test_one_line_a_load(caplog):
    source = torchvision.models.resnet18(weights=None).state_dict()
    target = torchvision.models.resnet18(weights=None, norm_layer=UBN)
    with caplog.at_level(logging.INFO, logger='mmubn'):
        target.load_state_dict(source)
        target.load_state_dict(source)
        target.load_state_dict(target.state_dict())
    assert len(caplog.records) == 2
    assert "into UBN layers (first: 'bn1')" in caplog.text


@pytest.mark.parametrize(
    ('settings', 'lost'), [(dict(bias=False), 'bias'), (dict(affine=False), 'weight and bias')]
)
def test_what_the_layer_has_no_place_for_is_told(settings, lost, caplog):
    state = nn.BatchNorm2d(4).state_dict()
    UBN(4, **settings).load_state_dict(state, strict=False)
    assert f'but its {lost} are left out, so outputs differ from BatchNorm' in caplog.text


def test_layer_round_trips(make_layer):
    layer = make_layer(5)
    randomize(layer)
    for offset in (0, 3):
        layer(torch.randn(4, 5, 6, 6) + offset)
    copied = make_layer(5)
    assert not any(copied.load_state_dict(copy.deepcopy(layer.state_dict())))
    assert_same_state(copied, layer)
    x = torch.randn(4, 5, 6, 6)
    assert torch.equal(copied(x), layer(x))  # the next training step, too


def test_ubn_checkpoint_is_never_taken_for_batch_norm(caplog):
    off = dict(fct=None, kernel_size=1, center=False, scale=False)
    for settings in ({}, off, dict(kernel_size=1), dict(center=False)):
        layer = UBN(4, **settings)
        randomize(layer)
        copied = UBN(4, **settings)
        copied.load_state_dict(layer.state_dict())
        assert torch.equal(copied.weight, layer.weight)
    assert not caplog.records


def test_missing_and_misfit_keys_stay_loud():
    full, bare = UBN(4), UBN(4, kernel_size=1, scale=False)
    with pytest.raises(RuntimeError, match=r'Missing key.*"kernel", "scale_weight", "scale_bias"'):
        full.load_state_dict(bare.state_dict())
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"kernel"'):
        bare.load_state_dict(full.state_dict())
    with pytest.raises(RuntimeError, match=r'Missing key.*"weight", "bias", "kernel"'):
        full.load_state_dict({})
    with pytest.raises(RuntimeError, match='size mismatch for running_mean'):
        full.load_state_dict(nn.BatchNorm2d(5).state_dict())
    with pytest.raises(RuntimeError, match='size mismatch for kernel'):
        full.load_state_dict(UBN(4, kernel_size=5).state_dict())
    incomplete = nn.BatchNorm2d(4).state_dict()
    del incomplete['running_var']
    with pytest.raises(RuntimeError, match=r'Missing key.*"running_var"'):
        full.load_state_dict(incomplete)


@torch.no_grad()
def learned(make_layer) -> nn.Module:
    """A layer with nothing at its initial value."""
    layer = make_layer(4)
    for value in (*layer.parameters(), *layer.buffers()):
        value.copy_(torch.rand(value.shape) + 2)
    return layer


def parts_of(state):
    """State dicts that hold some of the keys, as files of a split checkpoint do."""
    names = list(state)
    for order in (names, sorted(names), names[::-1]):
        for split in range(1, len(order)):
            yield {name: state[name] for name in order[:split]}
    for name in names:
        yield {other: value for other, value in state.items() if other != name}


def test_a_part_changes_what_it_holds_alone(make_layer):
    state = {k: v.clone() for k, v in learned(make_layer).state_dict().items()}
    own = set(state) - set(nn.BatchNorm2d(4).state_dict())
    batch_norm = set(nn.BatchNorm2d(4).state_dict()) - {'num_batches_tracked'}
    for part in parts_of(state):
        if own and batch_norm <= set(part) and own.isdisjoint(part):
            continue  # no one can tell it from BatchNorm's
        target = make_layer(4)
        before = {k: v.clone() for k, v in target.state_dict().items()}
        missing, unexpected = target.load_state_dict(part, strict=False)
        # BatchNorm does not miss its count where the dict does not say who wrote it.
        assert set(missing) == set(state) - set(part) - {'num_batches_tracked'}
        assert not unexpected
        for name, value in target.state_dict().items():
            assert torch.equal(value, part.get(name, before[name])), (name, list(part))


def test_a_model_with_keys_of_ours_has_no_batch_norm():
    """Keys taken out of one layer stay missing, as the rest of the model tells whose it is."""
    model = nn.Sequential(UBN(4), nn.Conv2d(4, 4, 1), UBN(4))
    for layer in (model[0], model[2]):
        randomize(layer)
    batch_norm = nn.BatchNorm2d(4).state_dict()
    state = {
        name: value
        for name, value in model.state_dict().items()
        if not name.startswith('2.') or name[2:] in batch_norm
    }
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r'Missing key.*"2.kernel", "2.center_weight"'):
        model.load_state_dict(state)
    assert_same_state(model, before)


def test_a_version_tells_whose_a_state_dict_is(make_layer):
    """Whole in BatchNorm's eyes, but written by one of these layers."""
    state = learned(make_layer).state_dict()
    for name in set(state) - set(nn.BatchNorm2d(4).state_dict()):
        del state[name]
    target = make_layer(4)
    before = target.weight.clone()
    missing, _ = target.load_state_dict(state, strict=False)
    assert len(missing) == len(target.state_dict()) - len(state)
    assert torch.equal(target.weight, state['weight'])
    assert not torch.equal(before, target.weight)


def test_a_file_without_metadata_is_batch_norms(make_layer):
    """Safetensors and dict comprehensions keep no version."""
    bn = trained(nn.BatchNorm2d(4))
    layer = make_layer(4)
    randomize(layer)
    layer.load_state_dict(dict(bn.state_dict()))
    x = torch.randn(3, 4, 5, 5)
    torch.testing.assert_close(layer.eval()(x), bn(x))
    old = dict(bn.state_dict())
    del old['num_batches_tracked']  # as before torch 0.4.1
    layer.load_state_dict(old, strict=False)
    torch.testing.assert_close(layer(x), bn(x))


def test_batch_norm_on_meta_by_assignment(make_layer):
    bn = trained(nn.BatchNorm2d(4))
    with torch.device('meta'):
        layer = make_layer(4)
        assert not any(layer.load_state_dict(bn.state_dict(), assign=True))
    x = torch.randn(3, 4, 5, 5)
    torch.testing.assert_close(layer.eval()(x), bn(x))
    for name, parameter in layer.named_parameters():
        assert parameter.requires_grad, name


@pytest.mark.parametrize(
    ('running_mean', 'fault'),
    [(torch.zeros(5), 'size mismatch for running_mean'), ([0.0], 'expected torch.Tensor')],
    ids=['size', 'type'],
)
def test_a_load_that_fails_changes_nothing(running_mean, fault, make_layer):
    layer = learned(make_layer)
    before = copy.deepcopy(layer.state_dict())
    channels = layer.num_features
    bad = {name: before[name].clone() for name in nn.BatchNorm2d(channels).state_dict()}
    bad.update(running_mean=running_mean, num_batches_tracked=torch.tensor(0))
    with pytest.raises(RuntimeError, match=fault):
        layer.load_state_dict(bad)
    before['num_batches_tracked'].zero_()  # a scalar fits, and torch takes what does
    assert_same_state(layer, before)

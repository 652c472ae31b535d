"""convert_norm on torchvision, timm and plain models, there and back."""

import copy
import logging

import pytest
import timm
import torch
import torchvision
from own_forward import ActivatedBatchNorm, ActivatedUBN, with_forward
from torch import nn
from weights import assert_same_state, difference, trained

import mmubn
from mmubn import layers
from mmubn.layers import RBN, UBN, SyncUBN

TYPES = {kind: getattr(layers, kind) for kind in layers.__all__}


def same_output(a: nn.Module, b: nn.Module, size: int = 64) -> None:
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = a(x)
        assert difference(b(x), expected) <= 1e-5


@pytest.mark.parametrize('kind', TYPES)
def test_torchvision_there_and_back(kind, caplog):
    caplog.set_level(logging.INFO, 'mmubn')
    model = trained(torchvision.models.resnet18(weights=None))
    converted = mmubn.convert_norm(copy.deepcopy(model), dict(type=kind))
    assert sum(isinstance(m, TYPES[kind]) for m in converted.modules()) == 20
    assert not any(type(m) is nn.BatchNorm2d for m in converted.modules())
    assert f'20 of 20 norm layers became {kind}' in caplog.text
    assert not any(m.training for m in converted.modules())
    same_output(model, converted)
    back = mmubn.convert_norm(converted, dict(type='BN'))
    assert sum(type(m) is nn.BatchNorm2d for m in back.modules()) == 20
    same_output(model, back)
    names = set(model.state_dict())
    assert set(back.state_dict()) == names


@pytest.mark.parametrize('name', ['resnet18', 'efficientnet_b0', 'mobilenetv3_small_100'])
def test_timm_keeps_drop_and_activation(name):
    model = trained(timm.create_model(name))
    names = set(model.state_dict())
    converted = mmubn.convert_norm(copy.deepcopy(model), dict(type='UBN'))
    same_output(model, converted)
    assert names < set(converted.state_dict())
    converted.train()(torch.randn(2, 3, 64, 64)).square().mean().backward()
    for key, parameter in converted.named_parameters():
        assert parameter.grad is not None, key
    copy.deepcopy(converted)


def test_settings_device_mode_and_gradient_are_kept():
    bn = nn.BatchNorm2d(4, eps=1e-3, momentum=0.03, dtype=torch.float64).requires_grad_(False)
    ubn = mmubn.convert_norm(bn, dict(type='UBN', fct=0.2, kernel_size=5))
    assert isinstance(ubn, UBN)
    assert (ubn.eps, ubn.momentum, ubn.fct, ubn.kernel_size) == (1e-3, 0.03, 0.2, 5)
    assert ubn.training
    assert ubn.kernel.dtype == torch.float64
    assert not any(p.requires_grad for p in ubn.parameters())


def test_sync_batch_norm_is_replaced_and_other_norms_are_not():
    model = nn.Sequential(nn.SyncBatchNorm(3), nn.BatchNorm1d(3), nn.GroupNorm(1, 3))
    mmubn.convert_norm(model, dict(type='RBN'))
    assert [type(m) for m in model] == [RBN, nn.BatchNorm1d, nn.GroupNorm]


def test_include_and_exclude(caplog):
    caplog.set_level(logging.INFO, 'mmubn')
    model = trained(torchvision.models.resnet18(weights=None))
    mmubn.convert_norm(model, dict(type='UBN'), include='layer[34].*', exclude=['*.downsample.*'])
    converted = {name for name, m in model.named_modules() if isinstance(m, UBN)}
    assert converted == {f'layer{s}.{b}.bn{i}' for s in (3, 4) for b in (0, 1) for i in (1, 2)}
    assert 'left alone: bn1, ' in caplog.text
    assert caplog.records[0].levelno == logging.INFO


def test_shared_layer_stays_shared():
    norm = nn.BatchNorm2d(3)
    model = nn.ModuleDict(dict(a=norm, again=norm, b=nn.Sequential(norm)))
    mmubn.convert_norm(model, dict(type='UBN'))
    assert isinstance(model['a'], UBN)
    assert model['a'] is model['again'] is model['b'][0]


def test_layer_without_any_tensor():
    bn = nn.BatchNorm2d(3, affine=False, track_running_stats=False)
    rbn = mmubn.convert_norm(bn, dict(type='RBN'))
    assert rbn.running_mean is None


@pytest.mark.parametrize(
    ('change', 'reason'),
    [
        ('center_weight', 'center_weight is not zero'),
        ('scale_weight', 'scale_weight is not zero'),
        ('kernel', 'kernel has taps beside its middle'),
    ],
)
def test_back_is_refused_where_it_is_not_exact(change, reason):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), UBN(4))
    with torch.no_grad():
        getattr(model[1], change)[2] += 0.1
    with pytest.raises(ValueError, match=f'1 cannot become BatchNorm: {reason}'):
        mmubn.convert_norm(model, dict(type='BN'))
    assert isinstance(model[1], UBN)


def test_back_with_trained_exact_parameters():
    ubn = UBN(4)
    with torch.no_grad():
        ubn.kernel[:, 0, 1, 1] = torch.tensor([1.0, -2, 0.5, 3])
        ubn.scale_bias.normal_()
        ubn.bias.normal_()
    x = torch.randn(2, 4, 5, 5)
    expected = ubn.eval()(x)
    torch.testing.assert_close(mmubn.convert_norm(ubn, dict(type='BN'))(x), expected)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ((dict(type='UBNN'),), f"type must be one of {', '.join(layers.__all__)}, BN, got 'UBNN'"),
        ((dict(type='UBN'), 'layer9*'), "pattern 'layer9\\*' matches none"),
        ((dict(type='BN'),), 'no layer to replace by BN: 0 .already BatchNorm2d'),
        (('UBN',), "norm_cfg must be a dict, such as dict.type='UBN'., got 'UBN'"),
    ],
)
def test_bad_arguments(arguments, message):
    model = nn.Sequential(nn.BatchNorm2d(3))
    with pytest.raises((ValueError, TypeError), match=message):
        mmubn.convert_norm(model, *arguments)
    assert type(model[0]) is nn.BatchNorm2d


def shaken() -> UBN:
    """A UBN whose every setting, weight and buffer differs from the initial one."""
    ubn = UBN(4, eps=1e-3, momentum=None, fct=0.3, fct_momentum=0.2, fct_warmup=7, kernel_size=5)
    with torch.no_grad():
        for value in ubn.state_dict().values():
            value.copy_(torch.rand(value.shape) + 1)
    return ubn


def test_ubn_to_sync_ubn_and_back_with_all_it_holds():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), shaken(), nn.BatchNorm2d(4)).eval()
    model[1].kernel.requires_grad_(False)
    before = copy.deepcopy(model)
    kept = mmubn.convert_norm(model, dict(type='SyncUBN'), include='1')
    assert type(kept[1]) is SyncUBN
    assert not kept[1].kernel.requires_grad
    assert kept[1].weight.requires_grad
    assert not kept[1].training
    assert torch.equal(kept(torch.ones(2, 3, 4, 4)), before(torch.ones(2, 3, 4, 4)))
    back = mmubn.convert_norm(kept, dict(type='UBN', fct=0.4), include='1')
    assert type(back[1]) is UBN
    assert repr(back[1]) == repr(before[1]).replace('fct=0.3', 'fct=0.4')
    assert_same_state(back, before)


def test_sync_ubn_from_batch_norms_and_to_batch_norm():
    group = object()  # only passed on
    batch_norm = nn.SyncBatchNorm(3, process_group=group)
    assert mmubn.convert_norm(batch_norm, dict(type='SyncUBN')).process_group is group
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    synchronised = mmubn.convert_norm(copy.deepcopy(model), dict(type='SyncUBN'))
    assert type(synchronised[1]) is SyncUBN
    same_output(model, synchronised)
    back = mmubn.convert_norm(synchronised, dict(type='BN'))
    assert type(back[1]) is nn.BatchNorm2d
    same_output(model, back)


def test_ubn_to_sync_ubn_of_another_kernel_is_refused():
    model = nn.Sequential(UBN(4))
    with pytest.raises(
        ValueError, match='0 cannot become SyncUBN: its weights do not fit SyncUBN with'
    ):
        mmubn.convert_norm(model, dict(type='SyncUBN', kernel_size=5))
    assert type(model[0]) is UBN


def test_fused_activation_stays_over_both_conversions():
    model = trained(timm.create_model('resnet18'))
    converted = mmubn.convert_norm(copy.deepcopy(model), dict(type='UBN'))
    same_output(model, mmubn.convert_norm(converted, dict(type='SyncUBN')))


def test_readme_norm_cfg_as_it_is():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3)).requires_grad_(False)
    norm_cfg = dict(type='UBN', fct=0.15, requires_grad=True)
    mmubn.convert_norm(model, norm_cfg)
    assert norm_cfg == dict(type='UBN', fct=0.15, requires_grad=True)
    assert all(p.requires_grad for p in model.parameters())
    mmubn.convert_norm(model, dict(type=SyncUBN, requires_grad=False))
    assert type(model[0]) is SyncUBN
    assert not any(p.requires_grad for p in model.parameters())


def with_buffer(norm):
    norm.register_buffer('mask', torch.ones(3))
    return norm


def with_layer(norm):
    norm.extra = nn.Identity()
    return norm


*FIRST, LAST = layers.__all__
OURS = f'{", ".join(FIRST)} and {LAST}'


@pytest.mark.parametrize(
    ('layer', 'norm_cfg', 'reason'),
    [
        (ActivatedUBN(3), dict(type='BN'), 'ActivatedUBN has a forward of its own, which would be'),
        (UBN(3), dict(type='UBN', fct=0.3), 'already UBN; set its attributes, such as eps or fct'),
        (RBN(3), dict(type='UBN'), 'RBN, which can only become BN; UBN and SyncUBN can also'),
        (nn.BatchNorm1d(3), dict(type='UBN'), 'BatchNorm1d; BatchNorm2d, SyncBatchNorm and'),
        (nn.LazyBatchNorm2d(), dict(type='UBN'), 'LazyBatchNorm2d; BatchNorm2d, Sync'),
        (nn.BatchNorm3d(3), dict(type='BN'), f'BatchNorm3d; {OURS}'),
        (
            torch.nn.utils.parametrizations.weight_norm(nn.BatchNorm2d(3)),
            dict(type='UBN'),
            'ParametrizedBatchNorm2d; BatchNorm2d',
        ),
        (with_buffer(nn.BatchNorm2d(3)), dict(type='UBN'), 'buffers mask beside those of BatchN'),
        (with_buffer(RBN(3)), dict(type='BN'), 'buffers mask beside those of RBN, which would be'),
        (with_layer(nn.BatchNorm2d(3)), dict(type='UBN'), 'layers extra beside those of BatchN'),
        (ActivatedBatchNorm(3), dict(type='UBN'), 'ActivatedBatchNorm; BatchNorm2d, SyncBatchNorm'),
        (
            with_forward(nn.BatchNorm2d(3)),
            dict(type='UBN'),
            'its forward was replaced on the layer',
        ),
    ],
)
def test_each_layer_left_alone_has_its_reason(layer, norm_cfg, reason, caplog):
    with pytest.raises(ValueError, match=f'no layer to replace by .*: 0 .{reason}'):
        mmubn.convert_norm(nn.Sequential(layer), norm_cfg)
    replaceable = UBN(3) if norm_cfg['type'] == 'BN' else nn.BatchNorm2d(3)
    model = nn.Sequential(layer, replaceable, nn.BatchNorm2d(3), UBN(3))
    mmubn.convert_norm(model, norm_cfg, include=['0', '1'])
    assert '; left alone: 0 (' in caplog.text
    assert caplog.records[0].levelno == logging.WARNING
    assert reason in caplog.text
    assert '2, 3 (not chosen by include and exclude)' in caplog.text


def frozen(layer: str):
    norm = nn.BatchNorm2d(3) if layer == 'torchvision' else timm.layers.BatchNormAct2d(3)
    norm = timm.layers.freeze_batch_norm_2d(trained(norm))
    assert not isinstance(norm, nn.BatchNorm2d)
    return norm


@pytest.mark.parametrize('layer', ['torchvision', 'timm'])
def test_a_frozen_batch_norm_is_named(layer, caplog):
    """Detectors of torchvision have them. They are no subclass of BatchNorm."""
    norm = frozen(layer)
    reason = f'0 .{type(norm).__name__}, which does not train; build the model with BatchNorm2d'
    with pytest.raises(ValueError, match=f'no layer to replace by UBN: {reason}'):
        mmubn.convert_norm(nn.Sequential(norm), dict(type='UBN'))
    mmubn.convert_norm(nn.Sequential(norm, nn.BatchNorm2d(3)), dict(type='UBN'))
    assert f'1 of 2 norm layers became UBN; left alone: 0 ({type(norm).__name__}' in caplog.text
    assert caplog.records[0].levelno == logging.WARNING


def test_what_the_error_of_a_frozen_batch_norm_advises():
    norm = frozen('torchvision')
    model = nn.Sequential(nn.BatchNorm2d(3)).eval()
    model.load_state_dict(nn.Sequential(norm).state_dict())
    mmubn.convert_norm(model, dict(type='UBN'))
    same_output(norm, model)


class Steps(nn.Module):
    """Takes its layers from what ``hold`` makes of them, which registers nothing."""

    def __init__(self, hold):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.steps = hold([self.conv, self.norm])

    def forward(self, x):
        return x


@pytest.mark.parametrize(
    'hold',
    [list, tuple, set, lambda layers: dict(enumerate(layers)), lambda layers: {'a': [layers]}],
)
def test_a_layer_that_a_plain_container_holds_is_left_alone(hold, caplog):
    """Replaced, it would get no gradient, and the old one would go on to train."""
    model = nn.Sequential(Steps(hold), nn.BatchNorm2d(3))
    mmubn.convert_norm(model, dict(type='UBN'))
    assert [type(m) for m in (model[0].norm, model[1])] == [nn.BatchNorm2d, UBN]
    assert '0.norm (0.steps holds it too and would go on to use the old layer)' in caplog.text
    assert caplog.records[0].levelno == logging.WARNING
    with pytest.raises(ValueError, match=r'no layer to replace by UBN: norm \(steps holds it too'):
        mmubn.convert_norm(Steps(hold), dict(type='UBN'))


def test_a_list_of_what_is_around_the_layers_is_no_obstacle():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    model.blocks = [model[0]]
    mmubn.convert_norm(model, dict(type='UBN'))
    assert type(model.blocks[0][1]) is UBN


def test_a_model_without_batch_norm_says_what_it_has():
    class NormStage(nn.Sequential):
        pass

    model = NormStage(nn.GroupNorm(1, 3), nn.GroupNorm(1, 3), nn.InstanceNorm2d(3))
    message = r'no BatchNorm; its norm layers are: 2 GroupNorm, 1 InstanceNorm2d$'
    with pytest.raises(ValueError, match=message):
        mmubn.convert_norm(model, dict(type='UBN'))


@pytest.mark.parametrize('kind', TYPES)
def test_tensors_that_keep_their_value_are_the_very_same(kind):
    bn = nn.BatchNorm2d(4)
    bn.weight.requires_grad_(False)
    bn.bias.data = bn.bias.data.double()
    bn.weight._no_weight_decay = True
    names = ('bias', 'running_mean', 'running_var', 'num_batches_tracked')
    before = {name: getattr(bn, name) for name in names}
    new = mmubn.convert_norm(bn, dict(type=kind))
    for name, value in before.items():
        assert getattr(new, name) is value, name
    assert new.weight._no_weight_decay
    for name, parameter in new.named_parameters():
        assert parameter.requires_grad == (name == 'bias'), name
        assert parameter.dtype == (torch.float64 if name == 'bias' else torch.float32), name


def test_dtypes_one_by_one():
    bn = nn.BatchNorm2d(4)
    bn.weight.data = bn.weight.data.bfloat16()
    new = mmubn.convert_norm(bn, dict(type='UBN'))
    dtypes = {name: value.dtype for name, value in new.state_dict().items()}
    half = ('weight', 'kernel', 'center_weight', 'scale_weight', 'scale_bias')
    assert {name for name, dtype in dtypes.items() if dtype == torch.bfloat16} >= set(half)
    assert dtypes['bias'] == dtypes['running_mean'] == torch.float32


def test_weights_shared_by_two_layers_stay_shared():
    a, b = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    b.weight, b.bias = a.weight, a.bias
    model = trained(nn.Sequential(a, nn.Conv2d(4, 4, 1), b))
    expected = copy.deepcopy(model)
    mmubn.convert_norm(model, dict(type='RBN'))
    assert model[0].weight is model[2].weight
    assert model[0].bias is model[2].bias
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(model(x), expected(x))
    mmubn.convert_norm(model, dict(type='BN'))
    assert model[0].weight is model[2].weight
    torch.testing.assert_close(model(x), expected(x))


def test_a_weight_shared_with_a_layer_that_stays_is_refused():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r'1\.weight is also the weight of a layer to replace'):
        mmubn.convert_norm(model, dict(type='UBN'), include='0')
    assert type(model[0]) is nn.BatchNorm2d
    mmubn.convert_norm(model, dict(type='BNET'), include='0')  # which keeps the weight's value
    assert model[0].weight is model[1].weight


def test_memory_shared_with_other_processes_stays_so():
    model = nn.Sequential(nn.BatchNorm2d(4)).share_memory()
    mmubn.convert_norm(model, dict(type='UBN'))
    for name, value in model.state_dict().items():
        assert value.is_shared(), name


def test_hooks_move_with_their_handles():
    model, seen = nn.Sequential(nn.BatchNorm2d(3)), []
    handles = [
        model[0].register_forward_hook(lambda m, args, y: seen.append(type(m).__name__)),
        model[0].register_forward_pre_hook(lambda m, args: seen.append('before')),
    ]
    mmubn.convert_norm(model, dict(type='UBN'))
    model(torch.randn(2, 3, 4, 4))
    assert seen == ['before', 'UBN']
    for handle in handles:
        handle.remove()
    model(torch.randn(2, 3, 4, 4))
    assert len(seen) == 2


@pytest.mark.parametrize(
    'register',
    [
        lambda norm, hook: norm.register_full_backward_hook(hook),
        lambda norm, hook: norm.register_full_backward_pre_hook(hook),
        lambda norm, hook: norm.weight.register_hook(hook),
        lambda norm, hook: norm.weight.register_post_accumulate_grad_hook(hook),
        lambda norm, hook: norm.bias.register_hook(hook),
    ],
)
def test_backward_hooks_move_with_their_handles(register):
    model, calls = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), []
    handle = register(model[1], lambda *arguments: calls.append(arguments))
    mmubn.convert_norm(model, dict(type='UBN'))
    model(torch.randn(2, 3, 4, 4)).sum().backward()
    assert len(calls) == 1
    handle.remove()
    model(torch.randn(2, 3, 4, 4)).sum().backward()
    assert len(calls) == 1


def test_a_hook_of_loading_is_given_the_new_layer():
    model, seen = nn.Sequential(nn.BatchNorm2d(3)), []

    def hook(layer, *arguments):
        seen.append(layer)

    model[0]._register_load_state_dict_pre_hook(hook, with_module=True)
    mmubn.convert_norm(model, dict(type='UBN'))
    model.load_state_dict(model.state_dict())
    assert seen == [model[0]]


def test_what_was_changed_on_the_built_layer_is_kept():
    bn = nn.BatchNorm2d(3)
    bn.track_running_stats, bn.momentum, bn.bias = False, None, None
    new = mmubn.convert_norm(bn, dict(type='UBN'))
    assert (new.track_running_stats, new.momentum, new.bias) == (False, None, None)
    assert new.running_mean is bn.running_mean
    sync = mmubn.convert_norm(new, dict(type='SyncUBN'))
    assert (sync.track_running_stats, sync.momentum, sync.bias) == (False, None, None)
    assert sync.kernel is new.kernel


@pytest.mark.parametrize('kind', TYPES)
def test_without_a_bias(kind):
    bn = nn.BatchNorm2d(3)
    bn.bias = None  # as torch's bias=False has it, from 2.12 on
    model = nn.Sequential(trained(bn)).eval()
    expected = copy.deepcopy(model)
    assert mmubn.convert_norm(model, dict(type=kind))[0].bias is None
    same_output(expected, model, size=6)
    assert mmubn.convert_norm(model, dict(type='BN'))[0].bias is None
    same_output(expected, model, size=6)
    assert mmubn.convert_norm(model, dict(type=kind, bias=True))[0].bias is not None
    same_output(expected, model, size=6)
    twin = TYPES[kind](3, bias=False).eval()
    twin.load_state_dict(expected[0].state_dict())  # a checkpoint of BatchNorm
    same_output(expected, twin, size=6)


@pytest.mark.parametrize('kind', TYPES)
def test_an_affine_layer_in_place_of_one_without(kind):
    model = nn.Sequential(nn.BatchNorm2d(3, affine=False)).eval()
    model[0].running_mean.normal_()
    expected = copy.deepcopy(model)
    same_output(expected, mmubn.convert_norm(model, dict(type=kind, affine=True)), size=6)


def test_settings_that_would_lose_something_are_refused():
    model = nn.Sequential(nn.BatchNorm2d(3))
    with pytest.raises(ValueError, match=r'0 cannot become UBN: with .* no weight and bias'):
        mmubn.convert_norm(model, dict(type='UBN', affine=False))
    with pytest.raises(ValueError, match='0 cannot become UBN: fct is a cosine'):
        mmubn.convert_norm(model, dict(type='UBN', fct=7))
    with pytest.raises(ValueError, match=r'0 cannot become RBN: with .* no bias'):
        mmubn.convert_norm(model, dict(type='RBN', bias=False))
    stateless = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False))
    with pytest.raises(ValueError, match='0 cannot become UBN: fct needs running statistics'):
        mmubn.convert_norm(stateless, dict(type='UBN'))


def test_conversion_on_meta():
    with torch.device('meta'):
        model = torchvision.models.resnet18()
    mmubn.convert_norm(model, dict(type='UBN'))
    assert all(value.is_meta for value in model.state_dict().values())


def test_hooks_of_fused_layers_come_after_the_activation():
    model = trained(timm.create_model('resnet18'))
    seen = []
    model.layer1[0].bn1.register_forward_hook(lambda m, args, y: seen.append(y.min().item()))
    plain = copy.deepcopy(model)
    converted = mmubn.convert_norm(model, dict(type='UBN'))
    same_output(plain, converted)
    torch.testing.assert_close(*map(torch.tensor, seen))  # of float32, which they are
    back = mmubn.convert_norm(converted, dict(type='BN'))
    same_output(plain, back)
    torch.testing.assert_close(seen[2], seen[3])


@pytest.mark.usefixtures('one_process')
def test_new_parameters_under_ddp_are_refused():
    """Its reducer knows the old ones alone, so the others would differ between processes."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), UBN(4))
    model = nn.ModuleDict(dict(part=nn.parallel.DistributedDataParallel(net)))
    for kind in ('UBN', 'BNET'):
        with pytest.raises(ValueError, match=r'^part.module.1 would get .* DistributedDataPar'):
            mmubn.convert_norm(model, dict(type=kind))
    assert type(net[1]) is nn.BatchNorm2d
    held = {name: id(value) for name, value in net.named_parameters()}
    mmubn.convert_norm(model, dict(type='SyncUBN'), include='part.module.2')
    assert type(net[2]) is SyncUBN
    assert {name: id(value) for name, value in net.named_parameters()} == held

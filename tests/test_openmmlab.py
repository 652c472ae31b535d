"""The layers inside mmdet, mmpretrain and mmengine: names, initialisers, traps."""

import pytest
import torch
from torch import nn

pytest.importorskip('mmdet')
pytest.importorskip('mmpretrain')

from mmengine.registry import DefaultScope

import mmubn
from mmubn import layers
from mmubn.layers import UBN
from mmubn.layers.base import RectifiedBatchNorm

# In one process SyncUBN is UBN.
TYPES = {kind: getattr(layers, kind) for kind in layers.__all__ if kind != 'SyncUBN'}
BACKBONES = {
    'mmdet.ResNet': dict(depth=50),
    'mmdet.ResNeXt': dict(depth=50, groups=32, base_width=4),
    'mmdet.Res2Net': dict(depth=50, scales=4, base_width=26),
    'mmpretrain.ResNet': dict(depth=50),
    'mmpretrain.ResNeXt': dict(depth=50),
    'mmpretrain.Res2Net': dict(depth=50, scales=4, base_width=26),
    'mmpretrain.ResNet_CIFAR': dict(depth=18),
    'mmpretrain.VGG': dict(depth=11),
}


def build(kind: str, **settings) -> nn.Module:
    scope, name = kind.split('.')
    registry = pytest.importorskip(f'{scope}.registry').MODELS
    pytest.importorskip(f'{scope}.models')
    with DefaultScope.overwrite_default_scope(scope):
        return registry.build(dict(type=name, **{**BACKBONES.get(kind, {}), **settings}))


def norms(model: nn.Module):
    return {
        n: m for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
    }


@pytest.mark.parametrize(
    ('kind', 'norm'),
    [
        *((kind, 'UBN') for kind in BACKBONES),
        *(('mmpretrain.ResNet_CIFAR', norm) for norm in TYPES if norm != 'UBN'),
    ],
)
def test_backbones_build_and_train(kind, norm):
    """Names are BatchNorm's, every norm is ours, a step reaches every parameter."""
    bn = build(kind, norm_cfg=dict(type='BN'))
    model = build(kind, norm_cfg=dict(type=norm))
    assert list(norms(model)) == list(norms(bn))
    assert all(type(m) is TYPES[norm] for m in norms(model).values())
    model.init_weights()
    model.train()
    y = model(torch.randn(2, 3, 64, 64))
    y = y[-1] if isinstance(y, tuple) else y
    y.backward(torch.randn_like(y))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize('norm', TYPES)
def test_init_weights_keeps_what_batch_norm_has_not(norm):
    """Kaiming for convolutions, Constant for norms, zero for the last of each branch."""
    model = build('mmdet.ResNet', depth=50, norm_cfg=dict(type=norm), zero_init_residual=True)
    fresh = TYPES[norm](64)
    model.init_weights()
    for name, module in norms(model).items():
        last = name.endswith('bn3')
        assert torch.equal(module.weight, torch.full_like(module.weight, 0 if last else 1)), name
        assert not module.bias.any(), name
        for key in ('center_weight', 'scale_weight', 'scale_bias'):
            value = getattr(module, key)
            if value is not None:
                assert torch.equal(value, getattr(fresh, key)[:1].expand_as(value)), (name, key)
        if module.kernel is not None and norm == 'UBN':
            identity = torch.zeros_like(module.kernel)
            identity[..., 1, 1] = 1
            assert torch.equal(module.kernel, identity), name


def test_with_cp_equals_without():
    """Checkpointed stages: the same gradients, statistics moved once."""
    settings = dict(depth=18, norm_cfg=dict(type='UBN'))
    plain = build('mmpretrain.ResNet', **settings)
    plain.init_weights()
    checkpointed = build('mmpretrain.ResNet', **settings, with_cp=True)
    checkpointed.load_state_dict(plain.state_dict())
    x = torch.randn(4, 3, 64, 64)
    for model in (plain, checkpointed):
        model.train()
        torch.manual_seed(3)
        y = model(x)[-1]
        y.backward(torch.randn_like(y))
    for (name, value), other in zip(plain.named_buffers(), checkpointed.buffers()):
        torch.testing.assert_close(other, value, msg=name)
    for (name, value), other in zip(plain.named_parameters(), checkpointed.parameters()):
        torch.testing.assert_close(other.grad, value.grad, msg=name)


def test_fusing_is_refused():
    from mmcv.cnn import ConvModule
    from mmengine.model.efficient_conv_bn_eval import turn_on_efficient_conv_bn_eval

    block = ConvModule(3, 4, 3, norm_cfg=dict(type='UBN'), efficient_conv_bn_eval=True).eval()
    with pytest.raises(RuntimeError, match='cannot be fused into a convolution'):
        block(torch.randn(2, 3, 8, 8))
    model = nn.ModuleDict(dict(net=nn.Sequential(nn.Conv2d(3, 4, 3), UBN(4))))
    with pytest.raises(TypeError, match='cannot be traced symbolically, as efficient_conv_bn_eval'):
        turn_on_efficient_conv_bn_eval(model, 'net')


def test_registered_once_however_often_imported():
    import importlib

    from mmengine.registry import MODELS

    importlib.reload(importlib.import_module('mmubn.registration'))
    for name, layer in TYPES.items():
        assert MODELS.get(name) is layer
        assert issubclass(layer, RectifiedBatchNorm)
    assert mmubn.UBN is UBN


@pytest.mark.parametrize('norm', TYPES)
def test_rtmdet_on_several_processes_names_its_own_switch(monkeypatch, norm):
    """It makes SyncBatchNorm of its layers by default, which it does not on one process."""
    monkeypatch.setattr('mmdet.models.detectors.rtmdet.get_world_size', lambda: 2)
    backbone = dict(type='ResNet', depth=18, norm_cfg=dict(type=norm))
    neck, head = (
        dict(type='ChannelMapper', in_channels=[512], out_channels=8),
        dict(type='RTMDetHead', num_classes=1, in_channels=8, norm_cfg=dict(type=norm)),
    )
    model = dict(backbone=backbone, neck=neck, bbox_head=head)
    with pytest.raises(RuntimeError, match='give RTMDet use_syncbn=False'):
        build('mmdet.RTMDet', **model)
    built = build('mmdet.RTMDet', **model, use_syncbn=False)
    assert {type(m) for m in norms(built).values()} == {TYPES[norm]}

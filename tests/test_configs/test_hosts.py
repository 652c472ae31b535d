"""The hosts' own recipes with other norms: what they change, and what norm_eval=True means."""

from functools import cache
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from resolved import resolved
from tool import CONFIGS, read_csv
from torch import nn
from weights import trained

from mmubn import UBN
from mmubn.reproduce.rows import HOST_TABLES

pytest.importorskip('mmdet')
BASES = {Path(line['config']).stem: line for line in read_csv(HOST_TABLES)}
# What each kind changes of its base.
TRAINS = dict(norm_eval=False)
CHANGES = {
    'bn': {},
    'ubn': dict(norm_cfg=dict(type='UBN', fct=0.15)),
    'ubn-frozen': dict(norm_cfg=dict(type='UBN', fct=0.15, requires_grad=True)),
    'sync-bn': dict(norm_cfg=dict(type='SyncBN', requires_grad=True), **TRAINS),
    'sync-ubn': dict(norm_cfg=dict(type='SyncUBN', fct=0.15, requires_grad=True), **TRAINS),
}
FILES = sorted((CONFIGS / 'hosts').glob('*.py'))
FROZEN = 'backbone.bn1', 'backbone.layer1'  # by frozen_stages=1


@cache
def base_of(stem: str) -> dict:
    line = BASES[stem]
    text = f"_base_ = '{line['host']}::{line['config']}'"
    return Config.fromstring(text, '.py').to_dict()


def test_every_network_of_the_zoos_has_its_configs():
    expected = set()
    for stem, line in BASES.items():
        kinds = ('bn', 'ubn') if line['host'] == 'mmpretrain' else CHANGES.keys() - {'ubn'}
        expected |= {f'{stem}_{kind}' for kind in kinds}
    assert {file.stem for file in FILES} == expected


@pytest.mark.parametrize('file', FILES, ids=lambda file: file.stem)
def test_changes_the_norm_alone(file):
    stem, _, kind = file.stem.rpartition('_')
    expected = Config(base_of(stem))
    expected.merge_from_dict(dict(model=dict(backbone=CHANGES[kind])))
    cfg = resolved(f'hosts/{file.name}').to_dict()
    assert cfg.pop('custom_imports') == dict(imports=['mmubn'], allow_failed_imports=False)
    (check,) = [hook for hook in cfg.pop('custom_hooks') if hook['type'] == 'UBNCheckHook']
    assert check.get('frozen_statistics', False) == (kind == 'ubn-frozen')  # else it would warn
    assert cfg == expected.to_dict()


# --- Frozen statistics: norm_eval=True from a BatchNorm backbone.


def load(kind: str) -> Config:
    return resolved(f'hosts/faster-rcnn_r50_fpn_1x_coco_{kind}.py')


def build(kind: str, **backbone) -> nn.Module:
    """The backbone of a detector, under the name that it has there."""
    cfg = load(kind)
    cfg.model.backbone.update(backbone)
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(cfg.model.backbone)
        model.init_weights()
    return nn.ModuleDict(dict(backbone=model)).train()


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory) -> Path:
    """A backbone with BatchNorm that has been trained, as torchvision's file has it."""
    torch.manual_seed(0)
    model = trained(build('bn', init_cfg=None).backbone)
    path = tmp_path_factory.mktemp('pretrained') / 'resnet50.pth'
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture
def backbones(pretrained):
    """That of Faster R-CNN as mmdet has it, and the one with UBN, from the same file."""
    init_cfg = dict(type='Pretrained', checkpoint=str(pretrained))
    return [build(kind, init_cfg=init_cfg) for kind in ('bn', 'ubn-frozen')]


def ubns(model: nn.Module) -> dict:
    return {name: m for name, m in model.named_modules() if isinstance(m, UBN)}


def test_starts_as_the_frozen_batch_norm_network(backbones):
    x = torch.randn(2, 3, 32, 64, dtype=torch.float64)
    theirs, ours = (model.backbone(x.float()) for model in backbones)
    for other, own in zip(theirs, ours):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-5 * other.abs().max().item())
    bn, ubn = (model.backbone.double() for model in backbones)
    ubn.load_state_dict(bn.state_dict())  # once more, without the rounding of float32
    torch.testing.assert_close(ubn(x), bn(x), rtol=1e-10, atol=1e-10)
    # In the backward pass too: the gradients of the weights that both have.
    gradients = []
    for backbone in (bn, ubn):
        generator = torch.Generator().manual_seed(1)
        outputs = backbone(x)
        scales = (torch.randn(out.shape, generator=generator).double() for out in outputs)
        sum((out * scale).sum() for out, scale in zip(outputs, scales)).backward()
        gradients.append({n: p.grad for n, p in backbone.named_parameters() if 'conv' in n})
    names = {name for name, grad in gradients[0].items() if grad is not None}
    assert 'layer2.0.conv1.weight' in names
    for name in names:
        torch.testing.assert_close(gradients[1][name], gradients[0][name], rtol=1e-8, atol=1e-8)


def step(model: nn.Module) -> None:
    """One step of the config's optimizer."""
    wrapper = build_optim_wrapper(model, load('ubn-frozen').optim_wrapper)
    outputs = model.backbone(torch.randn(2, 3, 32, 64))
    wrapper.update_params(sum((out * torch.randn_like(out)).mean() for out in outputs))


def test_parameters_train_and_statistics_do_not(backbones):
    model = backbones[1]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step(model)
    after = model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    own = 'weight', 'bias', 'kernel', 'center_weight', 'scale_weight', 'scale_bias'
    expected = {
        f'{layer}.{name}' for layer in ubns(model) if not layer.startswith(FROZEN) for name in own
    }
    assert len(expected) == 6 * 42
    assert expected == {n for n in moved if n.rpartition('.')[0] in ubns(model)}


def test_the_gate_does_nothing(backbones):
    model = backbones[1]
    for layer in ubns(model).values():
        layer.running_similarity.fill_(-1)  # which would shut it
    step(model)
    for layer in ubns(model).values():
        assert not layer.training
        assert layer.batch_statistics_used is None
        assert layer.running_similarity == -1
        assert layer.num_batches_tracked == 1000


def decays(model: nn.Module, **paramwise) -> dict:
    """Parameter of a norm layer that trains -> its weight decay, by the optimizer."""
    cfg = load('ubn-frozen').optim_wrapper
    wrapper = build_optim_wrapper(model, {**cfg, 'paramwise_cfg': paramwise} if paramwise else cfg)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {}
    for group in wrapper.optimizer.param_groups:
        for parameter in group['params']:
            layer, _, name = names[id(parameter)].rpartition('.')
            if layer in ubns(model) and parameter.requires_grad:
                found.setdefault(name, set()).add(group['weight_decay'])
    return found


@pytest.mark.parametrize(
    ('paramwise', 'kernel', 'others'),
    [
        ({}, 1e-4, 1e-4),
        (dict(norm_decay_mult=0.0, dwconv_decay_mult=5.0), 0, 0),
        # Matched by name, custom_keys come first.
        (dict(norm_decay_mult=0.0, custom_keys={'.kernel': dict(decay_mult=1.0)}), 1e-4, 0),
        (dict(custom_keys={'.kernel': dict(decay_mult=0.0)}), 0, 1e-4),
    ],
)
def test_weight_decay(backbones, paramwise, kernel, others):
    found = decays(backbones[1], **paramwise)
    assert found.pop('kernel') == {kernel}
    assert found.keys() == {'weight', 'bias', 'center_weight', 'scale_weight', 'scale_bias'}
    assert set.union(*found.values()) == {others}


def test_a_checkpoint_holds_the_frozen_statistics_and_goes_on_with_trained_ones(
    backbones, pretrained
):
    model = backbones[1]
    step(model)
    saved = model.backbone.state_dict()
    for name, value in torch.load(pretrained).items():
        if 'running' in name or 'tracked' in name:
            assert torch.equal(saved[name], value)
    other = build('ubn-frozen', init_cfg=None, norm_eval=False).backbone
    assert other.load_state_dict(saved) == ([], [])
    x = torch.randn(2, 3, 32, 64)
    with torch.no_grad():
        other.eval()
        torch.testing.assert_close(other(x), model.backbone(x))
        other.train()  # mmdet's returns nothing
        other(x)
    for name, layer in ubns(other).items():
        if not f'backbone.{name}'.startswith(FROZEN):
            # 1000 batches are in the statistics: no warm-up, and from here they move.
            assert layer.num_batches_tracked == 1001
            assert layer.running_similarity < 1

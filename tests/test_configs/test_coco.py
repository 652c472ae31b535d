"""The COCO configs: what they resolve to and what they build."""

import pytest
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from resolved import resolved
from torch.nn.modules.batchnorm import _BatchNorm

from mmubn import UBN

pytest.importorskip('mmdet')
MODELS_OF_PAPER = [
    f'{model}_rcnn_{depth}' for model in ('faster', 'mask') for depth in ('r50', 'r101')
]
# Layers in the stem and the first stage, 1 + 3 * 3 + 1, which mmdet freezes.
FROZEN = 11
LAYERS = {'r50': 53, 'r101': 104}


def load(name: str) -> Config:
    return resolved(f'{name}_1x_coco.py')


@pytest.mark.parametrize('name', MODELS_OF_PAPER)
def test_bn_config_differs_in_nothing_but_the_norm(name):
    ubn, bn = load(f'{name}_ubn').to_dict(), load(f'{name}_bn').to_dict()
    assert ubn['model']['backbone'].pop('norm_cfg') == dict(
        type='UBN', fct=0.15, requires_grad=True
    )
    assert bn['model']['backbone'].pop('norm_cfg') == dict(type='BN', requires_grad=True)
    assert ubn == bn


@pytest.mark.parametrize('name', MODELS_OF_PAPER)
def test_config_is_mmdets_but_for_the_norm(name):
    model, _, depth = name.split('_')
    ours = load(f'{name}_bn').to_dict()
    base = f'mmdet::{model}_rcnn/{model}-rcnn_{depth}_fpn_1x_coco.py'
    theirs = Config.fromstring(f"_base_ = '{base}'", '.py').to_dict()
    ours.pop('custom_imports')
    ours.pop('custom_hooks')
    assert theirs['model']['backbone'].pop('norm_eval') is True
    assert ours['model']['backbone'].pop('norm_eval') is False
    assert ours == theirs


def test_schedule_is_the_papers():
    cfg = load('mask_rcnn_r50_ubn')
    assert cfg.optim_wrapper.optimizer == dict(
        type='SGD', lr=0.02, momentum=0.9, weight_decay=0.0001
    )
    assert cfg.train_cfg.max_epochs == 12
    assert cfg.param_scheduler[1].milestones == [8, 11]
    assert cfg.train_dataloader.batch_size == 2
    assert cfg.auto_scale_lr.base_batch_size == 16


@pytest.mark.parametrize('norm', ['ubn', 'bn'])
@pytest.mark.parametrize('name', MODELS_OF_PAPER)
def test_norm_layers_train_beyond_the_frozen_stages(name, norm):
    cfg = load(f'{name}_{norm}')
    init_default_scope('mmdet')
    model = MODELS.build(cfg.model)
    model.train()
    layers = {key: m for key, m in model.named_modules() if isinstance(m, _BatchNorm)}
    assert {isinstance(layer, UBN) for layer in layers.values()} == {norm == 'ubn'}
    frozen = {key for key, layer in layers.items() if not layer.training}
    assert frozen == {key for key in layers if key.startswith(('backbone.bn1', 'backbone.layer1.'))}
    assert len(frozen) == FROZEN
    assert len(layers) == LAYERS[name.split('_')[2]]
    for key, layer in layers.items():
        assert all(p.requires_grad == (key not in frozen) for p in layer.parameters())

"""Checkpoints that differ from the model in what fine-tuning may change."""

import logging

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

pytest.importorskip('mmpretrain')

from mmubn.cli.checkpoint_check import check_pretrained, check_start
from mmubn.cli.errors import CommandError


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    init_default_scope('mmpretrain')
    monkeypatch.chdir(tmp_path)


def config(norm='UBN', classes=2, depth=18, stages=4, **backbone) -> Config:
    backbone = dict(
        type='ResNet',
        depth=depth,
        num_stages=stages,
        out_indices=(stages - 1,),
        strides=(1, 2, 2, 2)[:stages],
        dilations=(1,) * stages,
        stem_channels=4,
        base_channels=4,
        norm_cfg=dict(type=norm),
        **backbone,
    )
    neck = dict(type='GlobalAveragePooling')
    head = dict(type='LinearClsHead', num_classes=classes, in_channels=4 * 2 ** (stages - 1))
    return Config(dict(model=dict(type='ImageClassifier', backbone=backbone, neck=neck, head=head)))


def save(cfg: Config, rename=lambda name: name) -> None:
    weights = MODELS.build(cfg.model).state_dict()
    torch.save({rename(name): value for name, value in weights.items()}, 'x.pth')


def start_from(cfg: Config) -> Config:
    cfg.load_from = 'x.pth'
    return cfg


def pretrained(prefix=None, **settings) -> Config:
    return config(init_cfg=dict(type='Pretrained', checkpoint='x.pth', prefix=prefix), **settings)


@pytest.mark.parametrize('norm', ['BN', 'UBN', 'RBN', 'BNET', 'IEBN'])
def test_start_from_batch_norm_and_other_classes(norm, caplog):
    save(config('BN', classes=5))
    with caplog.at_level(logging.WARNING, 'mmubn'):
        check_start(start_from(config(norm)))
    assert not caplog.records  # the load that counts will say it


@pytest.mark.parametrize('norm', ['BN', 'UBN', 'RBN', 'BNET', 'IEBN'])
def test_pretrained_batch_norm_of_torchvision_and_mmpretrain(norm):
    # torchvision has conv1.weight, ... and fc.weight.
    save(config('BN'), lambda name: name.replace('backbone.', '').replace('head.fc.', 'fc.'))
    check_pretrained(pretrained(norm=norm))
    save(config('BN'))
    check_pretrained(pretrained('backbone.', norm=norm))
    check_pretrained(pretrained('backbone', norm=norm))


def test_pretrained_stages_above_those_of_the_model():
    save(config('BN'))
    check_pretrained(pretrained('backbone.', stages=3))
    save(config('BN', depth=34))
    with pytest.raises(CommandError, match=r'unknown to the model \(layer1.2.bn1.weight\)'):
        check_pretrained(pretrained('backbone.', stages=3))


def test_weights_of_a_parallel_model():
    save(config(), lambda name: f'module.{name}')
    check_start(start_from(config()))
    with pytest.raises(CommandError, match=r'60 keys unknown to the model \(backbone.bn1.kernel\)'):
        check_start(start_from(config('IEBN')))


# Of 20 layers 17 are called gn1 or gn2 there and lack all of 9 keys; 3 lack the statistics.
def test_group_norm_into_ubn():
    cfg = config('GN')
    cfg.model.backbone.norm_cfg.num_groups = 2
    save(cfg)
    with pytest.raises(CommandError, match=r'159 keys missing \(backbone.bn1.weight\)'):
        check_start(start_from(config()))


def test_pretrained_whole_model():
    init_cfg = dict(type='Pretrained', checkpoint='x.pth')
    cfg = config()
    cfg.model.init_cfg = init_cfg
    save(config('BN', classes=5))
    check_pretrained(cfg)
    save(config('RBN'))
    with pytest.raises(CommandError, match=r'^model.init_cfg.checkpoint: .*backbone.bn1.kernel'):
        check_pretrained(cfg)

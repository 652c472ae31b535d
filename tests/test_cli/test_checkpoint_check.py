"""Checkpoints that differ from the model in what fine-tuning may change."""

import logging
import shlex
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from told import told

pytest.importorskip('mmpretrain')

from mmubn import layers
from mmubn.cli.cfg_options import merge_options, parse_value
from mmubn.cli.checkpoint_check import (
    check_pretrained,
    check_start,
    check_weights,
    read_checkpoint,
)
from mmubn.cli.errors import CommandError
from mmubn.cli.model import build_model

NORMS = ['BN', *(name for name in layers.__all__ if name != 'SyncUBN')]
SCOPE = 'mmpretrain'


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


def check(function, cfg: Config) -> None:
    """Makes a check as the preflight does."""
    function(cfg, build_model(cfg))


def start_from(cfg: Config) -> Config:
    cfg.load_from = 'x.pth'
    return cfg


def pretrained(prefix=None, **settings) -> Config:
    return config(init_cfg=dict(type='Pretrained', checkpoint='x.pth', prefix=prefix), **settings)


@pytest.mark.parametrize('norm', NORMS)
def test_start_from_batch_norm_and_other_classes(norm, caplog):
    save(config('BN', classes=5))
    with caplog.at_level(logging.WARNING, 'mmubn'):
        check(check_start, start_from(config(norm)))
    assert not caplog.records  # the load that counts will say it


@pytest.mark.parametrize('norm', NORMS)
def test_pretrained_batch_norm_of_torchvision_and_mmpretrain(norm):
    # torchvision has conv1.weight, ... and fc.weight.
    save(config('BN'), lambda name: name.replace('backbone.', '').replace('head.fc.', 'fc.'))
    check(check_pretrained, pretrained(norm=norm))
    save(config('BN'))
    check(check_pretrained, pretrained('backbone.', norm=norm))
    check(check_pretrained, pretrained('backbone', norm=norm))


def test_pretrained_stages_above_those_of_the_model():
    save(config('BN'))
    check(check_pretrained, pretrained('backbone.', stages=3))
    save(config('BN', depth=34))
    with pytest.raises(CommandError, match=r'unknown to the model \(layer1.2.bn1.weight\)'):
        check(check_pretrained, pretrained('backbone.', stages=3))


def test_weights_of_a_parallel_model():
    save(config(), lambda name: f'module.{name}')
    check(check_start, start_from(config()))
    with pytest.raises(CommandError, match=r'60 keys unknown to the model \(backbone.bn1.kernel\)'):
        check(check_start, start_from(config('IEBN')))


# Of 20 layers 17 are called gn1 or gn2 there and lack all of 9 keys; 3 have weight and bias alone.
def test_group_norm_into_ubn():
    cfg = config('GN')
    cfg.model.backbone.norm_cfg.num_groups = 2
    save(cfg)
    with pytest.raises(CommandError, match=r'174 keys missing \(backbone.bn1.weight\)'):
        check(check_start, start_from(config()))


def test_pretrained_whole_model():
    init_cfg = dict(type='Pretrained', checkpoint='x.pth')
    cfg = config()
    cfg.model.init_cfg = init_cfg
    save(config('BN', classes=5))
    check(check_pretrained, cfg)
    save(config('RBN'))
    with pytest.raises(CommandError, match=r'^model.init_cfg.checkpoint: .*backbone.bn1.kernel'):
        check(check_pretrained, cfg)


@pytest.mark.parametrize(
    'init_cfg', [None, dict(type='Pretrained', checkpoint='no.pth', prefix='a')]
)
def test_start_from_a_bare_backbone(init_cfg, tmp_path):
    """As torchvision's and timm's files; what the message advises is followed word for word."""
    save(config('BN'), lambda name: name.replace('backbone.', '').replace('head.fc.', 'fc.'))
    Path('my weights').mkdir()
    Path('x.pth').rename('my weights/x.pth')
    cfg = config(init_cfg=init_cfg)
    cfg.load_from = 'my weights/x.pth'
    line = told(check, check_start, cfg)
    assert "its names lack 'backbone.', so it holds a backbone alone" in line
    advice = shlex.split(line.partition('--cfg-options ')[2])
    options = dict(text.split('=', 1) for text in advice)
    merge_options(cfg, {key: parse_value(value) for key, value in options.items()})
    check(check_start, cfg)
    check(check_pretrained, cfg)
    assert cfg.load_from is None
    assert cfg.model.backbone.init_cfg == dict(type='Pretrained', checkpoint='my weights/x.pth')


def test_a_folder_is_no_checkpoint(tmp_path):
    assert told(read_checkpoint, '--resume', str(tmp_path)) == (
        f'--resume: {tmp_path} is a folder; to go on with its last checkpoint give '
        f'--work-dir {tmp_path} --resume'
    )
    assert told(read_checkpoint, 'load_from', str(tmp_path)) == (
        f'load_from: {tmp_path} is a folder; give the path of a .pth file'
    )


def test_weights_under_another_name():
    weights = MODELS.build(config().model).state_dict()
    torch.save(dict(epoch=3, model=weights), 'x.pth')
    expected = (
        r"^load_from: x.pth has its weights under 'model', and mmengine looks under 'state_dict'; "
        r"save torch.load\('x.pth'\)\['model'\] to a file of its own$"
    )
    with pytest.raises(CommandError, match=expected):
        check(check_start, start_from(config()))


@pytest.mark.parametrize(
    ('key', 'split', 'work'),
    [('checkpoint', 'test', 'test'), ('--resume', 'train', 'training')],
)
@pytest.mark.parametrize(
    ('trained', 'fits'),
    [
        (('apple', 'bear'), True),
        (('bear', 'apple'), False),
        (('Apfel', 'Baer'), True),
        (None, True),
    ],
)
def test_classes_of_the_training(trained, fits, key, split, work):
    for name in ('apple', 'bear'):
        Path(split, name).mkdir(parents=True)
        cv2.imwrite(f'{split}/{name}/0.png', np.zeros((8, 8, 3), np.uint8))
    cfg = start_from(config())
    cfg[f'{split}_dataloader'] = dict(dataset=dict(type='CustomDataset', data_prefix=split))
    cfg.resume = split == 'train'
    function = check_start if cfg.resume else check_weights
    weights = MODELS.build(cfg.model).state_dict()
    meta = dict(iter=1, dataset_meta=dict(classes=trained) if trained else {})
    torch.save(dict(state_dict=weights, meta=meta), 'x.pth')
    if fits:
        check(function, cfg)
        return
    assert told(check, function, cfg) == (
        f"{key}: x.pth was trained with 'apple' as class 1, and {split}_dataloader.dataset has it "
        f'as class 0; give the {work} the classes of the checkpoint, in their order'
    )

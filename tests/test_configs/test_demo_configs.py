"""The demo configs: what differs, what trains, and a Runner's way through training and test."""

import math

import pytest
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.hooks import Hook
from mmengine.runner import Runner
from resolved import resolved
from torch import nn

from mmubn import UBN
from mmubn.datasets.scenes import CLASSES, make_scenes
from mmubn.runs import read_condensation


def load(norm):
    return resolved(f'demo/mask_rcnn_r18_{norm}_scenes.py')


def build(config):
    register_all_modules()
    return MODELS.build(config.model)


@pytest.mark.parametrize('name', ['mask_rcnn_r18_{}_scenes', 'resnet18_{}_shapes'])
def test_ubn_and_bn_differ_in_the_norm_alone(name):
    rest = []
    for norm in ('bn', 'ubn'):
        config = resolved(f'demo/{name.format(norm)}.py').to_dict()
        assert config['model']['backbone'].pop('norm_cfg')['type'] == norm.upper()
        rest.append(config)
    assert rest[0] == rest[1]


def test_classes_are_the_generators():
    config = load('ubn')
    assert config.model.roi_head.bbox_head.num_classes == len(CLASSES)
    assert config.model.roi_head.mask_head.num_classes == len(CLASSES)
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        assert tuple(loader.dataset.metainfo.classes) == CLASSES


def test_validation_and_test_see_held_out_scenes():
    config = load('ubn')
    assert config.train_dataloader.dataset.ann_file == 'annotations/instances_train.json'
    assert config.train_dataloader.dataset.data_prefix.img == 'train/'
    for loader, evaluator in (
        (config.val_dataloader, config.val_evaluator),
        (config.test_dataloader, config.test_evaluator),
    ):
        assert loader.dataset.data_prefix.img == 'val/'
        assert loader.dataset.ann_file == 'annotations/instances_val.json'
        assert evaluator.ann_file == 'data/scenes/annotations/instances_val.json'
        assert evaluator.metric == ['bbox', 'segm']


def test_needs_no_download():
    config = load('ubn')
    assert config.load_from is None
    assert config.model.backbone.init_cfg is None


@pytest.mark.parametrize(('norm', 'kind'), [('ubn', UBN), ('bn', nn.BatchNorm2d)])
def test_every_norm_trains(norm, kind):
    model = build(load(norm)).train()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 15
    assert {type(layer) for layer in norms} == {kind}
    assert all(layer.training for layer in norms)
    assert all(p.requires_grad for layer in norms for p in layer.parameters())


class _Losses(Hook):
    def __init__(self):
        self.seen = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.seen.append({name: value.item() for name, value in outputs.items()})


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    out_dir = tmp_path_factory.mktemp('scenes')
    make_scenes(out_dir, num_train=8, num_val=3)
    return out_dir


def test_trains_and_evaluates(scenes, tmp_path):
    config = load('ubn')
    config.work_dir = str(tmp_path)
    config.experiment_name = tmp_path.name
    config.train_cfg.max_epochs = config.train_cfg.val_interval = 1
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.data_root = str(scenes)
    for evaluator in (config.val_evaluator, config.test_evaluator):
        evaluator.ann_file = str(scenes / 'annotations' / 'instances_val.json')
    runner = Runner.from_cfg(config)
    losses = _Losses()
    runner.register_hook(losses)
    before = {name: value.clone() for name, value in runner.model.named_parameters()}

    runner.train()

    assert len(losses.seen) == 2
    assert {'loss_rpn_cls', 'loss_cls', 'loss_bbox', 'loss_mask'} < set(losses.seen[0])
    assert all(math.isfinite(value) for step in losses.seen for value in step.values())
    stuck = [n for n, p in runner.model.named_parameters() if p.equal(before[n])]
    assert not [name for name in stuck if 'bn' in name]
    assert (tmp_path / 'epoch_1.pth').is_file()
    metrics = runner.test()
    for name in ('bbox', 'segm'):
        assert 0 <= metrics[f'coco/{name}_mAP'] <= 1
    assert {row['where'] for row in read_condensation(tmp_path)} >= {'train/input', 'fixed/input'}

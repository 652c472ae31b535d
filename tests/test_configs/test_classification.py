"""The classification configs: what they resolve to, what they build, and two steps of each."""

import json
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner
from resolved import resolved
from tool import CONFIGS
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from mmubn.cli.data_root import set_data_root
from mmubn.runs import read_condensation

# Norm layers and millions of parameters of each network with BN.
NETWORKS = {
    'imagenet/resnet50': (53, 25.557),
    'imagenet/resnet101': (104, 44.549),
    'imagenet/resnext50': (53, 25.029),
    'imagenet/res2net50': (85, 25.699),
    'cifar100/resnet50': (53, 23.705),
    'cifar100/resnet101': (104, 42.697),
    'cifar100/resnet152': (155, 58.341),
    'cifar100/resnext50': (53, 14.789),
    'cifar100/vgg13': (10, 28.703),
    'cifar100/inception_v4': (149, 41.297),
    'cifar10/resnet18': (20, 11.174),
    'cifar10/resnet34': (36, 21.282),
    'cifar10/resnet50': (53, 23.521),
    'cifar10/resnet101': (104, 42.513),
    'cifar10/vgg11': (8, 28.150),
}
NORMS = {
    'bn': ('BatchNorm2d', dict(type='BN')),
    'ubn': ('UBN', dict(type='UBN', fct=0.15)),
    'in': ('InstanceNorm2d', dict(type='IN', affine=True)),
    'gn': ('GroupNorm', dict(type='GN', num_groups=32)),
    'iebn': ('IEBN', dict(type='IEBN')),
    'rbn': ('RBN', dict(type='RBN')),
    'bnet': ('BNET', dict(type='BNET')),
}
ALL = [(network, norm) for network in NETWORKS for norm in ('bn', 'ubn')]
SMALL = [f'{data}/resnet18_small_{data}.py' for data in ('cifar10', 'cifar100')]
ALL += [('cifar100/resnet50', norm) for norm in ('in', 'gn', 'iebn', 'rbn', 'bnet')]


def relative(network: str, norm: str) -> str:
    return f'{network}_{norm}_{network.split("/")[0]}.py'


def load(network: str, norm: str = 'bn') -> Config:
    return resolved(relative(network, norm))


def build(cfg: Config) -> nn.Module:
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        return MODELS.build(cfg.model)


def without_scope(node):
    if isinstance(node, dict):
        return {key: without_scope(value) for key, value in node.items() if key != '_scope_'}
    if isinstance(node, (list, tuple)):
        return [without_scope(value) for value in node]
    return node


def test_every_config_is_tested():
    found = {
        file.relative_to(CONFIGS).as_posix()
        for dataset in ('imagenet', 'cifar100', 'cifar10')
        for file in (CONFIGS / dataset).glob('*.py')
    }
    assert found == {*(relative(*names) for names in ALL), *SMALL}


@pytest.mark.parametrize(('network', 'norm'), [pair for pair in ALL if pair[1] != 'bn'])
def test_differs_from_bn_in_nothing_but_the_norm(network, norm):
    cfg, bn = load(network, norm), load(network)
    assert cfg['model']['backbone'].pop('norm_cfg') == NORMS[norm][1]
    assert bn['model']['backbone'].pop('norm_cfg') == NORMS['bn'][1]
    assert cfg.to_dict() == bn.to_dict()


@pytest.mark.parametrize(('network', 'norm'), ALL)
@pytest.mark.filterwarnings('ignore:Unnecessary conv bias')
def test_norm_layers_and_size(network, norm):
    number, millions = NETWORKS[network]
    cfg = load(network, norm)
    if norm == 'ubn':
        cfg.model.backbone.norm_cfg.fct = 0.2
    model = build(cfg)
    norms = [m for m in model.modules() if isinstance(m, (_NormBase, nn.GroupNorm))]
    assert Counter(type(m).__name__ for m in norms) == {NORMS[norm][0]: number}
    assert all(m.training for m in norms)
    if norm == 'ubn':
        assert {m.fct for m in norms} == {0.2}
    if norm == 'bn':
        size = sum(p.numel() for p in model.parameters())
        assert size / 1e6 == pytest.approx(millions, abs=0.0006)


@pytest.mark.parametrize(
    ('network', 'norm'),
    [
        ('imagenet/resnet50', 'ubn'),
        ('imagenet/res2net50', 'bn'),
        ('cifar100/inception_v4', 'ubn'),
        ('cifar100/resnet50', 'gn'),
        ('cifar10/vgg11', 'bn'),
    ],
)
def test_is_a_base_for_a_config_elsewhere(network, norm):
    name = relative(network, norm)
    cfg = Config.fromstring(f"_base_ = 'mmubn::{name}'", '.py')
    assert without_scope(cfg.to_dict()) == without_scope(load(network, norm).to_dict())


class _Toy(BaseModel):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x, mode):
        return dict(loss=(self.weight * x).sum())


class _Rates(Hook):
    def __init__(self):
        self.seen = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.seen.append(runner.optim_wrapper.get_lr()['lr'][0])


def learning_rates(cfg: Config, work_dir: Path, iters: int) -> np.ndarray:
    """Runs the schedule on a toy model; (epochs, iters)."""
    rates = _Rates()
    data = dict(dataset=[torch.ones(1)] * iters, batch_size=1, sampler=dict(type='DefaultSampler'))
    Runner(
        _Toy(),
        str(work_dir),
        train_dataloader=data,
        optim_wrapper=cfg.optim_wrapper,
        param_scheduler=cfg.param_scheduler,
        train_cfg=dict(by_epoch=True, max_epochs=cfg.train_cfg.max_epochs),
        default_hooks=dict(logger=None, checkpoint=None),
        custom_hooks=[rates],
        default_scope='mmpretrain',
        experiment_name=work_dir.name,
        log_level='ERROR',
    ).train()
    return np.reshape(rates.seen, (cfg.train_cfg.max_epochs, iters))


# The network of each data set whose recipe is run.
RUN = dict(imagenet='imagenet/resnet50', cifar100='cifar100/vgg13', cifar10='cifar10/resnet18')


@pytest.mark.parametrize(
    ('data', 'epochs', 'decay', 'milestones', 'factor'),
    [
        ('imagenet', 90, 1e-4, (30, 60), 0.1),
        ('cifar100', 200, 5e-4, (60, 120, 160), 0.2),
        ('cifar10', 200, 1e-4, (100, 150), 0.1),
    ],
)
def test_recipe_is_the_papers(data, epochs, decay, milestones, factor, tmp_path):
    cfg = load(RUN[data])
    assert without_scope(cfg.optim_wrapper.optimizer) == dict(
        type='SGD', lr=0.1, momentum=0.9, weight_decay=decay
    )
    rates = learning_rates(cfg, tmp_path, iters=5)
    assert len(rates) == epochs
    drops = [sum(epoch >= milestone for milestone in milestones) for epoch in range(epochs)]
    expected = np.repeat(0.1 * factor ** np.array(drops)[:, None], 5, 1)
    if data == 'cifar100':
        assert rates[0] == pytest.approx(np.linspace(0.001, 0.1, 5))
        rates, expected = rates[1:], expected[1:]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize('network', NETWORKS)
def test_recipe_is_that_of_the_data_set(network):
    data = network.split('/')[0]
    cfg, run = load(network), load(RUN[data])
    for key in ('optim_wrapper', 'param_scheduler', 'train_cfg'):
        assert cfg[key] == run[key], key
    images = {'imagenet/resnet50': 4 * 256}.get(network, 8 * 256 if data == 'imagenet' else 3 * 128)
    assert cfg.auto_scale_lr.base_batch_size == images
    assert cfg.train_dataloader.batch_size == (256 if data == 'imagenet' else 128)
    assert cfg.val_evaluator.topk == cfg.test_evaluator.topk == (1, 5)


def test_cifar_data_is_mmpretrains_and_not_downloaded():
    for name, kind in (('cifar10/resnet18', 'CIFAR10'), ('cifar100/vgg13', 'CIFAR100')):
        cfg = load(name)
        base = f'mmpretrain::_base_/datasets/{kind.lower()}_bs16.py'
        theirs = Config.fromstring(f"_base_ = '{base}'", '.py')
        assert without_scope(cfg.data_preprocessor) == without_scope(theirs.data_preprocessor)
        assert cfg.model.head.num_classes == cfg.data_preprocessor.num_classes
        for split in ('train', 'val', 'test'):
            dataset = cfg[f'{split}_dataloader'].dataset
            expected = theirs[f'{split}_dataloader'].dataset
            assert without_scope(dataset) == {**without_scope(expected), 'download': False}
            assert dataset.type == kind


@pytest.fixture(scope='module')
def images(tmp_path_factory) -> Path:
    """Class folders with eight images to train on and two to test on."""
    root = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for split, count in (('train', 4), ('test', 1), ('val', 1)):
        for name in ('a', 'b'):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                image = rng.integers(0, 256, (32, 32, 3), np.uint8)
                cv2.imwrite(str(folder / f'{number}.png'), image)
    return root


def train_two_iterations(cfg: Config, work_dir: Path) -> dict:
    """Trains an epoch of eight images in batches of four; the last numbers logged."""
    cfg.train_cfg.max_epochs = 1
    cfg.default_hooks.checkpoint = None
    cfg.default_hooks.logger.interval = 1
    cfg.randomness = dict(seed=0)
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].update(batch_size=4, num_workers=0)
    cfg.work_dir, cfg.experiment_name = str(work_dir), work_dir.name
    runner = Runner.from_cfg(cfg)
    before = {name: p.detach().clone() for name, p in runner.model.named_parameters()}
    runner.train()
    assert runner.iter == 2
    assert all(p.isfinite().all() for p in runner.model.parameters())
    moved = {
        name for name, p in runner.model.named_parameters() if not torch.equal(p, before[name])
    }
    assert moved == before.keys()
    lines = next(work_dir.glob('*/vis_data/scalars.json')).read_text().splitlines()
    return {key: value for line in lines for key, value in json.loads(line).items()}


def tiny(network: str, norm: str, images: Path) -> Config:
    cfg = load(network, norm)
    set_data_root(cfg, str(images))
    if network.startswith('imagenet'):
        for split in ('train', 'val', 'test'):
            # The thousand classes have names, two folders have others.
            cfg[f'{split}_dataloader'].dataset.metainfo = dict(classes=('a', 'b'))
        cfg.train_dataloader.dataset.pipeline[1].scale = 64
        for split in ('val', 'test'):
            cfg[f'{split}_dataloader'].dataset.pipeline[1].scale = 64
            cfg[f'{split}_dataloader'].dataset.pipeline[2].crop_size = 64
    return cfg


FAST = [('cifar10/resnet18', 'ubn'), ('cifar10/vgg11', 'bn')]
OTHERS = [pair for pair in ALL if pair not in FAST and pair[1] != 'bn']


@pytest.mark.parametrize(
    ('network', 'norm'), [*FAST, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in OTHERS)]
)
@pytest.mark.filterwarnings('ignore:Unnecessary conv bias')
def test_trains_and_evaluates(network, norm, images, tmp_path):
    logged = train_two_iterations(tiny(network, norm, images), tmp_path)
    assert logged['loss'] > 0
    assert {'accuracy/top1', 'accuracy/top5'} <= logged.keys()


def test_a_config_elsewhere_trains(images, tmp_path):
    text = """
_base_ = 'mmubn::cifar100/resnet50_ubn_cifar100.py'
model = dict(
    backbone=dict(depth=18, stem_channels=8, base_channels=8, norm_cfg=dict(fct=0.3)),
    head=dict(in_channels=64))
"""
    cfg = Config.fromstring(text, '.py')
    set_data_root(cfg, str(images))
    assert train_two_iterations(cfg, tmp_path)['lr'] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ('norm', 'small'), [('BN', SMALL[0]), ('UBN', SMALL[0]), ('UBN', SMALL[1])]
)
def test_small_config_trains_with_any_norm(norm, small, images, tmp_path):
    cfg = resolved(small)
    cfg.merge_from_dict({'model.backbone.norm_cfg.type': norm})
    set_data_root(cfg, str(images))
    assert 'accuracy/top1' in train_two_iterations(cfg, tmp_path)
    kind = 'BatchNorm2d' if norm == 'BN' else norm
    assert {row['type'] for row in read_condensation(tmp_path)} == {kind}


def test_demo_trains_without_data(tmp_path):
    cfg = resolved('demo/resnet18_ubn_shapes.py')
    cfg.train_dataloader.dataset.count = cfg.val_dataloader.dataset.count = 8
    assert 'accuracy/top1' in train_two_iterations(cfg, tmp_path)
    assert {row['where'] for row in read_condensation(tmp_path)} >= {'train/input', 'fixed/input'}

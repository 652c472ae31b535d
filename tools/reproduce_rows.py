"""The paper's tables and figures as rows: what to train, and what the paper and the hosts found.

The figures' curves are given without numbers, and for several the paper names neither the
network nor the thresholds; what is assumed then is said in :data:`TITLES`.
"""

import csv
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

from mmubn.cli.errors import CommandError

PAPER = Path(__file__).with_name('paper_tables.csv')
HOST_TABLES = Path(__file__).with_name('host_tables.csv')
# What the configs of the project set for each norm.
NORM_CFGS = {
    'BN': dict(type='BN'),
    'IN': dict(type='IN', affine=True),
    'GN': dict(type='GN', num_groups=32),
    'RBN': dict(type='RBN'),
    'BNET': dict(type='BNET'),
    'IEBN': dict(type='IEBN'),
    'UBN': dict(type='UBN', fct=0.15),
    'SyncBN': dict(type='SyncBN'),
    'SyncUBN': dict(type='SyncUBN', fct=0.15),
}
PAPER_NORMS = ('BN', 'IN', 'GN', 'RBN', 'BNET', 'IEBN', 'UBN')
SCENES = 'CIFAR scenes'  # of the study of batches of two
STEMS = {
    'Inception-v4': 'inception_v4',
    'Faster R-CNN R50': 'faster_rcnn_r50',
    'Faster R-CNN R101': 'faster_rcnn_r101',
    'Mask R-CNN R50': 'mask_rcnn_r50',
    'Mask R-CNN R101': 'mask_rcnn_r101',
}
FROZEN_BN = 'BN, frozen statistics'
FROZEN_UBN = 'UBN, frozen statistics'
IDENTITY_BNET = 'BNET, identity kernel'
THRESHOLDS = (0.1, 0.15, 0.2, 0.3, 0.5)
BATCH_SIZES = (32, 64, 128, 256, 512)
ABLATION = {
    'BN + running statistics rectification': dict(kernel_size=1, center=False, scale=False),
    'BN + normalization rectification': dict(fct=None, kernel_size=1),
    'BN + affine rectification': dict(fct=None, center=False, scale=False),
}
TITLES = {
    'table2': 'Table 2: ImageNet',
    'table3': 'Table 3: CIFAR-100',
    'table4': 'Table 4: CIFAR-10',
    'table5': 'Table 5: object detection on COCO',
    'table6': 'Table 6: instance segmentation on COCO',
    'table7': 'Table 7: batch sizes',
    'table8': "Table 8: time and epochs until BN's final accuracy",
    'figure2': 'Figure 2: condensation under BN (network not named: ResNet-50, CIFAR-100)',
    'figure4': 'Figure 4: norms over the epochs of CIFAR-100',
    'figure5': 'Figure 5: each rectification by itself, CIFAR-10',
    'figure6': 'Figure 6: thresholds, CIFAR-10 (values not named: ours)',
    'figure7-10': 'Figures 7 to 10: condensation on ImageNet (networks not named: Table 2)',
    'figure11-16': 'Figures 11 to 16: thresholds (networks and values not named: ours)',
    'figure17-36': 'Figures 17 to 36: batch sizes, BN and UBN',
    'figure37-40': 'Figures 37 to 40: each rectification by itself',
    'ours': 'Not in the paper: the warm-up of the gate, no gate, initial kernels',
    'hosts-detection': "Not in the paper: mmdet's recipes (own norm: BN, statistics frozen)",
    'hosts-classification': "Not in the paper: mmpretrain's recipes (own norm: BN)",
    'batches-of-two': 'Not in the paper: fine-tuning a detector with two images a step',
    'strong-recipe': 'Not in the paper: CIFAR-100, longer and tuned for BN',
    'small-batches': 'Not in the paper: Table 7 with batches of 2 to 128, learning rate scaled',
}


@dataclass(frozen=True)
class ZooModel:
    """What the model zoo of mmdet or mmpretrain has of a network, with BatchNorm.

    Attributes:
        config (str): As ``_base_`` names it: ``mmdet::...``.
        version (str): Of the package whose metafile gives the values.
        note (str): How it differs from the paper's row; empty for not at all.
        values (dict): Metric -> value in per cent.
    """

    config: str
    version: str
    note: str
    values: Dict[str, float] = field(default_factory=dict)

    @property
    def stem(self) -> str:
        """The name of the config's file."""
        return Path(self.config.split('::')[1]).stem


def _read_zoo() -> Dict[Tuple[str, str], ZooModel]:
    """By the paper's names of data set and network."""
    found: Dict[Tuple[str, str], ZooModel] = {}
    with HOST_TABLES.open(newline='') as file:
        for line in csv.DictReader(file):
            config = f'{line["host"]}::{line["config"]}'
            model = ZooModel(config, line['version'], line['note'])
            key = line['dataset'], line['model']
            found.setdefault(key, model).values[line['metric']] = float(line['value'])
    return found


ZOO = _read_zoo()


@dataclass(frozen=True)
class Row:
    """A line of a table or a curve of a figure.

    Attributes:
        experiment (str): A key of :data:`TITLES`.
        dataset, model (str): As the paper names them.
        norm (str): The label of the norm, in which the rows of a model differ.
        base (str): A key of :data:`NORM_CFGS`; the config has this norm.
        changes (dict): Of that norm's settings.
        batch_size (int, optional): For each GPU, where the row changes it.
        paper (dict): Metric -> the paper's value; empty for a curve.
        options (dict): Settings beside the norm's, by their dotted keys.
        file (str): The config in ``configs/``, where the other attributes do not give it.
        network (str): A config in ``configs/`` that every norm is put into, in place of one
            for each norm.
        pretrained (str): The norm of the backbone that the training starts from, in a
            study with a pretraining.
    """

    experiment: str
    dataset: str
    model: str
    norm: str
    base: str
    changes: Dict[str, Any] = field(default_factory=dict)
    batch_size: int = 0
    paper: Dict[str, float] = field(default_factory=dict)
    options: Dict[str, Any] = field(default_factory=dict)
    file: str = ''
    network: str = ''
    pretrained: str = ''

    @property
    def name(self) -> str:
        """Unique among the rows of a network."""
        return f'{self.norm}, batch {self.batch_size}' if self.batch_size else self.norm

    @property
    def label(self) -> str:
        """Unique in its experiment."""
        return f'{self.dataset}, {self.model}, {self.name}'

    @property
    def config(self) -> str:
        """Path in ``configs/``."""
        if self.file or self.network:
            return self.file or self.network
        stem = STEMS.get(self.model) or self.model.lower().replace('-', '')
        if self.dataset == 'COCO':
            return f'{stem}_{self.base.lower()}_1x_coco.py'
        data = self.dataset.lower().replace('-', '')
        return f'{data}/{stem}_{self.base.lower()}_{data}.py'

    @property
    def norm_cfg(self) -> Dict[str, Any]:
        """All of the norm's settings."""
        return {**NORM_CFGS[self.base], **self.changes}

    @property
    def extra(self) -> Dict[str, Any]:
        """Settings beside the norm's, by their dotted keys."""
        batch = {'train_dataloader.batch_size': self.batch_size} if self.batch_size else {}
        return {**batch, **self.options}

    @property
    def detects(self) -> bool:
        """Whether it is detection, and not classification."""
        return self.dataset in ('COCO', SCENES)

    @property
    def zoo(self) -> Optional[ZooModel]:
        """The network with the host's own BatchNorm, where its model zoo has it."""
        return ZOO.get((self.dataset, self.model))

    def is_baseline_of(self, other: 'Row') -> bool:
        """Whether it is the same with BN."""
        return self.norm == 'BN' and self.differs_in_norm(other)

    def differs_in_norm(self, other: 'Row') -> bool:
        """Whether all but the norm and its treatment is the same."""
        keys = ('experiment', 'dataset', 'model', 'batch_size')
        return all(getattr(self, key) == getattr(other, key) for key in keys)


def _tables() -> Iterator[Row]:
    """Rows of the paper's tables, with the values of its CSV."""
    found: Dict[Tuple, Dict[str, float]] = {}
    with PAPER.open(newline='') as file:
        for line in csv.DictReader(file):
            metric, _, batch = line['metric'].partition('_bs')
            key = 'table' + line['table'], line['dataset'], line['model'], line['norm'], batch
            found.setdefault(key, {})[metric] = float(line['value'])
    for (table, dataset, model, norm, batch), paper in found.items():
        yield Row(table, dataset, model, norm, norm, batch_size=int(batch or 0), paper=paper)


def _pairs(experiment: str, dataset: str, models: Sequence[str], batches=(0,)) -> Iterator[Row]:
    for model in models:
        for batch in batches:
            for norm in ('BN', 'UBN'):
                yield Row(experiment, dataset, model, norm, norm, batch_size=batch)


def _ablation(experiment: str, dataset: str, models: Sequence[str]) -> Iterator[Row]:
    for model in models:
        yield Row(experiment, dataset, model, 'BN', 'BN')
        for label, changes in ABLATION.items():
            yield Row(experiment, dataset, model, label, 'UBN', changes)
        yield Row(experiment, dataset, model, 'UBN', 'UBN')


def _thresholds(experiment: str, dataset: str, models: Sequence[str]) -> Iterator[Row]:
    for model in models:
        yield Row(experiment, dataset, model, 'BN', 'BN')
        for fct in THRESHOLDS:
            changes = {} if fct == NORM_CFGS['UBN']['fct'] else dict(fct=fct)
            yield Row(experiment, dataset, model, f'UBN, FCT {fct:g}', 'UBN', changes)


def _figures() -> Iterator[Row]:
    resnets = ('ResNet-50', 'ResNet-101')
    yield from _pairs('figure2', 'CIFAR-100', resnets[:1])
    for norm in PAPER_NORMS:
        yield Row('figure4', 'CIFAR-100', 'ResNet-50', norm, norm)
    yield from _ablation('figure5', 'CIFAR-10', resnets)
    yield from _thresholds('figure6', 'CIFAR-10', resnets[1:])
    yield from _pairs('figure7-10', 'ImageNet', (*resnets, 'ResNeXt-50', 'Res2Net-50'))
    yield from _thresholds('figure11-16', 'CIFAR-10', ('ResNet-18', 'ResNet-34', 'ResNet-50'))
    yield from _thresholds('figure11-16', 'CIFAR-100', (*resnets, 'ResNet-152'))
    for dataset in ('CIFAR-10', 'CIFAR-100'):
        yield from _pairs('figure17-36', dataset, resnets, BATCH_SIZES)
    for dataset in ('CIFAR-10', 'CIFAR-100'):
        yield from _ablation('figure37-40', dataset, resnets)


def _ours() -> Iterator[Row]:
    place = 'ours', 'CIFAR-100', 'ResNet-50'
    yield Row(*place, 'BN', 'BN')
    yield Row(*place, 'UBN', 'UBN')
    yield Row(*place, 'UBN, literal gate', 'UBN', dict(fct_warmup=0))
    yield Row(*place, 'UBN, long gate warm-up', 'UBN', dict(fct_warmup=400))
    yield Row(*place, 'UBN, no gate', 'UBN', dict(fct=None))
    yield Row(*place, 'BNET, published kernel', 'BNET')
    yield Row(*place, IDENTITY_BNET, 'BNET', dict(kernel_init='identity'))


def _hosts() -> Iterator[Row]:
    """The recipes of the model zoos with other norms.

    norm_eval is said again here, as in the config: so that ``--config`` keeps it.
    """
    frozen, trains = ({'model.backbone.norm_eval': value} for value in (True, False))
    for (dataset, model), zoo in ZOO.items():
        stem = f'hosts/{zoo.stem}'
        if dataset != 'COCO':
            place = 'hosts-classification', dataset, model
            yield Row(*place, 'BN', 'BN', file=f'{stem}_bn.py')
            yield Row(*place, 'UBN', 'UBN', file=f'{stem}_ubn.py')
            continue
        place = 'hosts-detection', dataset, model
        yield Row(*place, 'BN', 'BN', options=trains)  # the paper's: its own config
        yield Row(*place, FROZEN_BN, 'BN', options=frozen, file=f'{stem}_bn.py')
        yield Row(*place, 'UBN', 'UBN', options=trains)
        yield Row(*place, FROZEN_UBN, 'UBN', options=frozen, file=f'{stem}_ubn-frozen.py')
        yield Row(*place, 'SyncBN', 'SyncBN', options=trains, file=f'{stem}_sync-bn.py')
        yield Row(*place, 'SyncUBN', 'SyncUBN', options=trains, file=f'{stem}_sync-ubn.py')


def _batches_of_two() -> Iterator[Row]:
    place = 'batches-of-two', SCENES, 'Faster R-CNN, small ResNet-18'
    shared = dict(network='studies/faster_rcnn_r18_cifar_scenes.py', pretrained='BN')
    frozen = {'model.backbone.norm_eval': True}
    yield Row(*place, 'BN', 'BN', **shared)
    yield Row(*place, FROZEN_BN, 'BN', options=frozen, **shared)
    yield Row(*place, 'GN', 'GN', **{**shared, 'pretrained': 'GN'})
    yield Row(*place, 'UBN', 'UBN', **shared)
    yield Row(*place, FROZEN_UBN, 'UBN', options=frozen, **shared)
    yield Row(*place, 'UBN, no gate', 'UBN', dict(fct=None), **shared)
    yield Row(*place, 'RBN', 'RBN', **shared)
    yield Row(*place, 'BNET', 'BNET', **shared)
    for batch in (8, 16):
        yield Row(*place, 'BN', 'BN', batch_size=batch, **shared)
        yield Row(*place, 'UBN', 'UBN', batch_size=batch, **shared)
    everything = {'model.backbone.frozen_stages': -1}
    network = shared['network']
    yield Row(*place, 'BN, no pretraining', 'BN', options=everything, network=network)


def _strong_recipe() -> Iterator[Row]:
    place = 'strong-recipe', 'CIFAR-100', 'ResNet-18 of half the channels'
    network = 'studies/resnet18_strong_cifar100.py'
    for norm in ('BN', 'UBN', 'RBN'):
        yield Row(*place, norm, norm, network=network)
    yield Row(*place, 'UBN, no gate', 'UBN', dict(fct=None), network=network)
    yield Row(*place, 'BNET, published kernel', 'BNET', network=network)
    yield Row(*place, IDENTITY_BNET, 'BNET', dict(kernel_init='identity'), network=network)


def _small_batches() -> Iterator[Row]:
    place = 'small-batches', 'CIFAR-10', 'small ResNet-18'
    network = 'cifar10/resnet18_small_cifar10.py'  # learning rate 0.1 for 64 images
    for batch in (2, 4, 8, 32, 128):
        shared = dict(
            batch_size=batch,
            options={'optim_wrapper.optimizer.lr': 0.1 * batch / 64},
            network=network,
        )
        yield Row(*place, 'BN', 'BN', **shared)
        yield Row(*place, 'UBN', 'UBN', **shared)
        yield Row(*place, 'UBN, no gate', 'UBN', dict(fct=None), **shared)


# The questions that minus BN does not answer: a norm, and what it is set against.
_FROZEN = ((FROZEN_UBN, FROZEN_BN), ('UBN', FROZEN_BN), ('UBN', FROZEN_UBN))
_NO_GATE = ('UBN, no gate', 'UBN')
_KERNEL = (IDENTITY_BNET, 'BNET, published kernel')
CONTRASTS: Dict[str, Sequence[Tuple[str, str]]] = {
    'ours': (('UBN, literal gate', 'UBN'), ('UBN, long gate warm-up', 'UBN'), _NO_GATE, _KERNEL),
    'hosts-detection': (*_FROZEN, ('SyncUBN', 'SyncBN'), ('SyncUBN', FROZEN_BN)),
    'batches-of-two': (
        *_FROZEN,
        ('UBN, no gate', FROZEN_BN),
        ('RBN', FROZEN_BN),
        ('BNET', FROZEN_BN),
        ('GN', FROZEN_BN),
        _NO_GATE,
        (FROZEN_BN, 'BN, no pretraining'),
    ),
    'strong-recipe': (_NO_GATE, _KERNEL, ('UBN', 'RBN'), ('UBN', IDENTITY_BNET)),
    'small-batches': (_NO_GATE,),
}
ROWS: List[Row] = [
    *_tables(),
    *_figures(),
    *_ours(),
    *_hosts(),
    *_batches_of_two(),
    *_strong_recipe(),
    *_small_batches(),
]


def select(experiments: Sequence[str], patterns: Sequence[str], one_network: bool) -> List[Row]:
    """The rows asked for.

    Args:
        experiments (Sequence[str]): Keys of :data:`TITLES`; empty for all.
        patterns (Sequence[str]): Shell patterns of which a row's norm or label matches
            one; empty for all rows.
        one_network (bool): Keep of the rows that differ in network and data alone only
            the first, as another config gives these.

    Raises:
        CommandError: An unknown experiment, or no row matches.
    """
    for name in experiments:
        if name not in TITLES:
            raise CommandError(f'no experiment {name}; there are {", ".join(TITLES)}')
    rows = [row for row in ROWS if not experiments or row.experiment in experiments]
    if one_network:
        first: Dict[Tuple, Row] = {}
        for row in rows:
            first.setdefault((row.experiment, row.norm, row.batch_size), row)
        rows = list(first.values())
    if patterns:
        chosen = [row for row in rows if _matches(row, patterns)]
        if not chosen:
            names = ', '.join(dict.fromkeys(row.norm for row in rows))
            raise CommandError(f'--rows {" ".join(patterns)}: no such row; the norms are {names}')
        rows = chosen
    return rows


def _matches(row: Row, patterns: Sequence[str]) -> bool:
    return any(
        fnmatch(name, pattern) for name in (row.norm, row.name, row.label) for pattern in patterns
    )

"""The experiments, each in one place: its title, rows, pictures, contrasts, and its study.

The figures' curves are given without numbers, and for several the paper's text names neither
the network nor the thresholds; what is assumed then is said in the titles.
"""

from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Any, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

from ..cli.errors import CommandError
from .cifar_scenes import make_cifar_scenes
from .rows import NORM_CFGS, SCENES, ZOO, Row, paper_rows
from .study import LEARNING_RATE, TRAINING_IMAGES, WEIGHT_DECAY, Study


@dataclass(frozen=True)
class Experiment:
    """A table or figure of the paper, or a question of ours.

    Attributes:
        name (str): Its name on the command line.
        title (str): Of the report; begins with ``Table``, ``Figure`` or ``Not in the paper``.
        rows (Sequence[Row]): What is trained.
        plots (Sequence[str]): Which pictures of :mod:`.plot` it gets: ``curves``, ``loss``,
            ``differences``, ``thresholds``, ``batch_sizes``, ``condensation``. The last is a
            table of the report as well.
        contrasts (Sequence[tuple[str, str]]): The questions that minus BN does not answer: a
            norm, and the one that it is set against.
        study (Study, optional): How the rows are trained, where that is more than their
            configs.
        is_speed (bool): It asks for the time until BN's final accuracy, and not for a value.
    """

    name: str
    title: str
    rows: Sequence[Row]
    plots: Sequence[str] = ()
    contrasts: Sequence[Tuple[str, str]] = ()
    study: Optional[Study] = None
    is_speed: bool = False

    def __post_init__(self) -> None:
        named = tuple(replace(row, experiment=self.name) for row in self.rows)
        object.__setattr__(self, 'rows', named)

    @property
    def is_figure(self) -> bool:
        """Whether the paper has curves of it, without numbers."""
        return self.title.startswith('Figure')

    @property
    def is_ours(self) -> bool:
        """Whether the paper does not have it."""
        return self.title.startswith('Not in the paper')

    def is_tuned(self, option: str) -> bool:
        """Whether an option, ``KEY=VALUE``, is one that the study chooses."""
        return self.study is not None and option.split('=')[0] in self.study.grid


# --- Norms and settings that several experiments name.

FROZEN_BN = 'BN, frozen statistics'
FROZEN_UBN = 'UBN, frozen statistics'
LITERAL_GATE = 'UBN, literal gate'
LONG_WARM_UP = 'UBN, long gate warm-up'
NO_GATE = 'UBN, no gate'
PUBLISHED_BNET = 'BNET, published kernel'
IDENTITY_BNET = 'BNET, identity kernel'
NO_PRETRAINING = 'BN, no pretraining'

_FROZEN = ((FROZEN_UBN, FROZEN_BN), ('UBN', FROZEN_BN), ('UBN', FROZEN_UBN))
_GATE = (NO_GATE, 'UBN')
_KERNEL = (IDENTITY_BNET, PUBLISHED_BNET)
_RECTIFIED = {
    'BN + running statistics rectification': dict(kernel_size=1, center=False, scale=False),
    'BN + normalization rectification': dict(fct=None, kernel_size=1),
    'BN + affine rectification': dict(fct=None, center=False, scale=False),
}

_FROZEN_STATISTICS = {'model.backbone.norm_eval': True}
# What a row has by its norm, where that is no key of NORM_CFGS.
_TREATMENTS: Dict[str, Dict[str, Any]] = {
    FROZEN_BN: dict(base='BN', options=_FROZEN_STATISTICS),
    FROZEN_UBN: dict(base='UBN', options=_FROZEN_STATISTICS),
    LITERAL_GATE: dict(base='UBN', changes=dict(fct_warmup=0)),
    LONG_WARM_UP: dict(base='UBN', changes=dict(fct_warmup=400)),
    NO_GATE: dict(base='UBN', changes=dict(fct=None)),
    PUBLISHED_BNET: dict(base='BNET'),
    IDENTITY_BNET: dict(base='BNET', changes=dict(kernel_init='identity')),
    # In a classifier all stages train anyway. There it gives these runs a folder of their own.
    NO_PRETRAINING: dict(base='BN', options={'model.backbone.frozen_stages': -1}),
    **{label: dict(base='UBN', changes=changes) for label, changes in _RECTIFIED.items()},
}

RESNETS = ('ResNet-50', 'ResNet-101')


# --- Rows.


def _rows(dataset: str, model: str, norms: Iterable[str], **others: Any) -> Iterator[Row]:
    """A row of each norm, or treatment of one, that differ in nothing else."""
    for norm in norms:
        yield Row(dataset, model, norm, **{'base': norm, **_TREATMENTS.get(norm, {}), **others})


def _pairs(dataset: str, models: Iterable[str], batches: Sequence[int] = (0,)) -> Iterator[Row]:
    for model in models:
        for batch in batches:
            yield from _rows(dataset, model, ('BN', 'UBN'), batch_size=batch)


def _ablation(dataset: str, models: Iterable[str]) -> Iterator[Row]:
    """Each of the three rectifications by itself."""
    for model in models:
        yield from _rows(dataset, model, ('BN', *_RECTIFIED, 'UBN'))


def _thresholds(dataset: str, models: Iterable[str]) -> Iterator[Row]:
    for model in models:
        yield Row(dataset, model, 'BN', 'BN')
        for fct in (0.1, 0.15, 0.2, 0.3, 0.5):
            changes = {} if fct == NORM_CFGS['UBN']['fct'] else dict(fct=fct)
            yield Row(dataset, model, f'UBN, FCT {fct:g}', 'UBN', changes)


def _hosts_detection() -> Iterator[Row]:
    """The recipes of mmdet's model zoo with other norms.

    norm_eval is said again here, as in the config: so that ``--config`` keeps it.
    """
    trains = dict(options={'model.backbone.norm_eval': False})
    for place, zoo in ZOO.items():
        if place[0] != 'COCO':
            continue
        stem = f'hosts/{zoo.stem}'
        yield from _rows(*place, ['BN'], **trains)  # the paper's: its own config
        yield from _rows(*place, [FROZEN_BN], file=f'{stem}_bn.py')
        yield from _rows(*place, ['UBN'], **trains)
        yield from _rows(*place, [FROZEN_UBN], file=f'{stem}_ubn-frozen.py')
        yield from _rows(*place, ['SyncBN'], file=f'{stem}_sync-bn.py', **trains)
        yield from _rows(*place, ['SyncUBN'], file=f'{stem}_sync-ubn.py', **trains)


def _hosts_classification() -> Iterator[Row]:
    """The recipes of mmpretrain's model zoo with UBN."""
    for place, zoo in ZOO.items():
        if place[0] != 'COCO':
            for norm in ('BN', 'UBN'):
                yield Row(*place, norm, norm, file=f'hosts/{zoo.stem}_{norm.lower()}.py')


def _batches_of_two() -> Iterator[Row]:
    place = SCENES, 'Faster R-CNN, small ResNet-18'
    network = dict(network='studies/faster_rcnn_r18_cifar_scenes.py')
    shared = dict(network, pretrained='BN')
    yield from _rows(*place, ['BN', FROZEN_BN], **shared)
    yield from _rows(*place, ['GN'], pretrained='GN', **network)
    yield from _rows(*place, ['UBN', FROZEN_UBN, NO_GATE, 'RBN', 'BNET'], **shared)
    for batch in (8, 16):
        yield from _rows(*place, ['BN', 'UBN'], batch_size=batch, **shared)
    yield from _rows(*place, [NO_PRETRAINING], **network)


def _fine_tuning() -> Iterator[Row]:
    place = 'CIFAR-10', 'small ResNet-18'
    network = dict(network='studies/resnet18_fine_tuning_cifar10.py')
    shared = dict(network, pretrained='BN')
    yield from _rows(*place, ['BN', 'UBN', NO_GATE, 'RBN'], **shared)
    yield from _rows(*place, ['BN', NO_GATE], batch_size=8, **shared)
    yield from _rows(*place, [NO_PRETRAINING], **network)


# The last of CIFAR's training images, to tune on.
_LAST_IMAGES = {
    'val_dataloader.dataset.split': 'train',
    'val_dataloader.dataset.indices': -5000,
}
_OTHER_IMAGES = {TRAINING_IMAGES: 5000, **_LAST_IMAGES}


def _strong_recipe(norms: Iterable[str]) -> Iterator[Row]:
    network = 'studies/resnet18_strong_cifar100.py'
    return _rows('CIFAR-100', 'ResNet-18 of half the channels', norms, network=network)


# Of the small ResNet-18, which trains on the first 5,000 images.
_SMALL_STUDY = Study(
    seeds=5,
    grid={LEARNING_RATE: (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)},
    metric='top1',
    validation=_OTHER_IMAGES,
    tuning_budget=0.5,
)
_STRONG_STUDY = Study(
    seeds=3,
    grid={LEARNING_RATE: (0.2, 0.4, 0.8), WEIGHT_DECAY: (2e-4, 5e-4, 1e-3, 2e-3)},
    metric='top1',
    validation={TRAINING_IMAGES: 45000, **_LAST_IMAGES},
    tuning_budget=1 / 6,
    tuned_for='BN',
)
# UBN's best point of the grid above was its corner, 0.8 and 2e-4.
_WIDE_GRID = {
    LEARNING_RATE: (*_STRONG_STUDY.grid[LEARNING_RATE], 1.6),
    WEIGHT_DECAY: (1e-4, *_STRONG_STUDY.grid[WEIGHT_DECAY]),
}


def _small_batches() -> Iterator[Row]:
    network = 'cifar10/resnet18_small_cifar10.py'  # learning rate 0.1 for 64 images
    for batch in (2, 4, 8, 32, 128):
        shared = dict(batch_size=batch, options={LEARNING_RATE: 0.1 * batch / 64}, network=network)
        yield from _rows('CIFAR-10', 'small ResNet-18', ['BN', 'UBN', NO_GATE], **shared)


def _small_batches_tuned() -> Iterator[Row]:
    for batch in (8, 64):
        shared = dict(batch_size=batch, network='cifar10/resnet18_small_cifar10.py')
        yield from _rows('CIFAR-10', 'small ResNet-18', ['BN', 'UBN', 'RBN', NO_GATE], **shared)


def _longer_small_batches() -> Iterator[Row]:
    shared = dict(batch_size=8, network='studies/resnet18_longer_cifar10.py')
    return _rows('CIFAR-10', 'small ResNet-18', ['BN', NO_GATE], **shared)


def _longer_training() -> Iterator[Row]:
    longer = dict(network='studies/resnet18_longer_cifar10.py')
    more = dict(network='cifar10/resnet18_small_cifar10.py', options={TRAINING_IMAGES: 20000})
    for change, shared in (('32 epochs', longer), ('20,000 images', more)):
        yield from _rows('CIFAR-10', f'small ResNet-18, {change}', ['BN', NO_GATE], **shared)


# --- Experiments, in the order in which they are listed.

_EXPERIMENTS = (
    Experiment('table2', 'Table 2: ImageNet', paper_rows('2'), ('curves', 'differences')),
    Experiment('table3', 'Table 3: CIFAR-100', paper_rows('3'), ('curves', 'differences')),
    Experiment('table4', 'Table 4: CIFAR-10', paper_rows('4'), ('curves', 'differences')),
    Experiment(
        'table5',
        'Table 5: object detection on COCO',
        paper_rows('5'),
        ('curves', 'loss', 'differences'),
    ),
    Experiment(
        'table6',
        'Table 6: instance segmentation on COCO',
        paper_rows('6'),
        ('curves', 'loss', 'differences'),
    ),
    Experiment('table7', 'Table 7: batch sizes', paper_rows('7'), ('batch_sizes',)),
    Experiment(
        'table8',
        "Table 8: time and epochs until BN's final accuracy",
        paper_rows('8'),
        ('curves',),
        is_speed=True,
    ),
    Experiment(
        'figure2',
        'Figure 2: condensation under BN (network not named: ResNet-50, CIFAR-100)',
        _pairs('CIFAR-100', RESNETS[:1]),
        ('condensation',),
    ),
    Experiment(
        'figure4',
        'Figure 4: norms over the epochs of CIFAR-100',
        _rows('CIFAR-100', 'ResNet-50', ('BN', 'IN', 'GN', 'RBN', 'BNET', 'IEBN', 'UBN')),
        ('curves',),
    ),
    Experiment(
        'figure5',
        'Figure 5: each rectification by itself, CIFAR-10',
        _ablation('CIFAR-10', RESNETS),
        ('curves', 'differences'),
    ),
    Experiment(
        'figure6',
        'Figure 6: thresholds, CIFAR-10 (values not named: ours)',
        _thresholds('CIFAR-10', RESNETS[1:]),
        ('thresholds',),
    ),
    Experiment(
        'figure7-10',
        'Figures 7 to 10: condensation on ImageNet (networks not named: Table 2)',
        _pairs('ImageNet', (*RESNETS, 'ResNeXt-50', 'Res2Net-50')),
        ('condensation',),
    ),
    Experiment(
        'figure11-16',
        'Figures 11 to 16: thresholds (networks and values not named: ours)',
        (
            *_thresholds('CIFAR-10', ('ResNet-18', 'ResNet-34', 'ResNet-50')),
            *_thresholds('CIFAR-100', (*RESNETS, 'ResNet-152')),
        ),
        ('thresholds',),
    ),
    Experiment(
        'figure17-36',
        'Figures 17 to 36: batch sizes, BN and UBN',
        (
            row
            for dataset in ('CIFAR-10', 'CIFAR-100')
            for row in _pairs(dataset, RESNETS, (32, 64, 128, 256, 512))
        ),
        ('batch_sizes',),
    ),
    Experiment(
        'figure37-40',
        'Figures 37 to 40: each rectification by itself',
        (row for dataset in ('CIFAR-10', 'CIFAR-100') for row in _ablation(dataset, RESNETS)),
        ('differences',),
    ),
    Experiment(
        'ours',
        'Not in the paper: the warm-up of the gate, no gate, initial kernels',
        _rows(
            'CIFAR-100',
            'ResNet-50',
            ('BN', 'UBN', LITERAL_GATE, LONG_WARM_UP, NO_GATE, PUBLISHED_BNET, IDENTITY_BNET),
        ),
        ('curves', 'differences'),
        contrasts=((LITERAL_GATE, 'UBN'), (LONG_WARM_UP, 'UBN'), _GATE, _KERNEL),
    ),
    Experiment(
        'hosts-classification',
        "Not in the paper: mmpretrain's recipes (own norm: BN)",
        _hosts_classification(),
        ('curves', 'differences'),
    ),
    Experiment(
        'hosts-detection',
        "Not in the paper: mmdet's recipes (own norm: BN, statistics frozen)",
        _hosts_detection(),
        ('curves', 'loss', 'differences'),
        contrasts=(*_FROZEN, ('SyncUBN', 'SyncBN'), ('SyncUBN', FROZEN_BN)),
    ),
    Experiment(
        'batches-of-two',
        'Not in the paper: fine-tuning a detector with two images per step',
        _batches_of_two(),
        ('loss', 'differences'),
        contrasts=(
            *_FROZEN,
            (NO_GATE, FROZEN_BN),
            ('RBN', FROZEN_BN),
            ('BNET', FROZEN_BN),
            ('GN', FROZEN_BN),
            _GATE,
            (FROZEN_BN, NO_PRETRAINING),
        ),
        study=Study(
            seeds=5,
            grid={LEARNING_RATE: (0.001, 0.003, 0.01, 0.03)},
            metric='bbox_AP',
            validation={
                'val_dataloader.dataset.ann_file': 'annotations/instances_val.json',
                'val_dataloader.dataset.data_prefix.img': 'val/',
                'val_evaluator.ann_file': 'data/cifar_scenes/annotations/instances_val.json',
            },
            tuning_budget=0.5,
            pretraining='studies/resnet18_pretraining_cifar100.py',
            prepare=make_cifar_scenes,
            pretraining_folder='cifar100',
        ),
    ),
    Experiment(
        'fine-tuning',
        'Not in the paper: fine-tuning a classifier',
        _fine_tuning(),
        ('curves', 'differences'),
        contrasts=(_GATE, (NO_GATE, 'RBN'), ('BN', NO_PRETRAINING)),
        study=replace(
            _SMALL_STUDY,
            grid={LEARNING_RATE: (0.003, 0.01, 0.03, 0.1, 0.3)},
            pretraining='studies/resnet18_pretraining_cifar100.py',
            folder='cifar10',
            pretraining_folder='cifar100',
        ),
    ),
    Experiment(
        'strong-recipe',
        'Not in the paper: CIFAR-100, longer and tuned for BN',
        _strong_recipe(('BN', 'UBN', 'RBN', NO_GATE, PUBLISHED_BNET, IDENTITY_BNET)),
        ('curves', 'differences', 'condensation'),
        contrasts=(_GATE, _KERNEL, ('UBN', 'RBN'), ('UBN', IDENTITY_BNET)),
        study=_STRONG_STUDY,
    ),
    Experiment(
        'strong-recipe-tuned',
        'Not in the paper: CIFAR-100, longer and every norm tuned for itself',
        _strong_recipe(('BN', 'UBN', NO_GATE)),
        ('curves', 'differences', 'condensation'),
        contrasts=(_GATE,),
        study=replace(_STRONG_STUDY, tuned_for='', grid=_WIDE_GRID),
    ),
    Experiment(
        'small-batches',
        'Not in the paper: Table 7 with batches of 2 to 128, learning rate scaled',
        _small_batches(),
        ('differences', 'batch_sizes'),
        contrasts=(_GATE,),
    ),
    Experiment(
        'small-batches-tuned',
        'Not in the paper: small batches, every norm tuned for itself',
        _small_batches_tuned(),
        ('differences', 'curves'),
        contrasts=(_GATE, (NO_GATE, 'RBN')),
        study=_SMALL_STUDY,
    ),
    Experiment(
        'longer-training',
        'Not in the paper: four times the epochs, and four times the images',
        _longer_training(),
        ('differences', 'curves'),
        study=replace(
            _SMALL_STUDY,
            grid={LEARNING_RATE: (0.03, 0.1, 0.3, 1.0)},
            validation=_LAST_IMAGES,  # rows differ in the number of images
        ),
    ),
    Experiment(
        'longer-small-batches',
        'Not in the paper: four times the epochs with 8 images per step',
        _longer_small_batches(),
        ('differences', 'curves'),
        study=replace(
            _SMALL_STUDY, grid={LEARNING_RATE: (0.01, 0.03, 0.1, 0.3)}, tuning_budget=0.25
        ),
    ),
)
EXPERIMENTS: Dict[str, Experiment] = {experiment.name: experiment for experiment in _EXPERIMENTS}
ROWS: List[Row] = [row for experiment in _EXPERIMENTS for row in experiment.rows]


def select(experiments: Sequence[str], patterns: Sequence[str], one_network: bool) -> List[Row]:
    """The rows asked for.

    Args:
        experiments (Sequence[str]): Keys of :data:`EXPERIMENTS`; empty for all.
        patterns (Sequence[str]): Shell patterns of which a row's norm or label matches
            one; empty for all rows.
        one_network (bool): Keep of the rows that differ in network and data alone only
            the first, as another config gives these.

    Raises:
        CommandError: An unknown experiment, or no row matches.
    """
    for name in experiments:
        if name not in EXPERIMENTS:
            raise CommandError(f'no experiment {name}; there are {", ".join(EXPERIMENTS)}')
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

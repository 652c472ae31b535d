"""A row of a table or figure: what to train, and what the paper and the hosts found."""

import csv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from .. import layers

PAPER = Path(__file__).with_name('paper_tables.csv')
HOST_TABLES = Path(__file__).with_name('host_tables.csv')
# What the configs of the project set for each norm. Ours with a gate have the threshold of the
# paper.
NORM_CFGS = {
    'BN': dict(type='BN'),
    'IN': dict(type='IN', affine=True),
    'GN': dict(type='GN', num_groups=32),
    'SyncBN': dict(type='SyncBN'),
    **{
        name: dict(type=name, fct=0.15)
        if issubclass(getattr(layers, name), layers.UBN)
        else dict(type=name)
        for name in layers.__all__
    },
}
BATCH_NORMS = ('BN', 'SyncBN', *layers.__all__)
SCENES = 'CIFAR scenes'  # of the study of batches of two
STEMS = {
    'Inception-v4': 'inception_v4',
    'Faster R-CNN R50': 'faster_rcnn_r50',
    'Faster R-CNN R101': 'faster_rcnn_r101',
    'Mask R-CNN R50': 'mask_rcnn_r50',
    'Mask R-CNN R101': 'mask_rcnn_r101',
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
        experiment (str): The name of the experiment that it belongs to, which sets it.
    """

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
    experiment: str = ''

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


def several(rows: Sequence[Row]) -> bool:
    """Whether they are of more than one network or data set."""
    return len({(row.dataset, row.model) for row in rows}) > 1


def name_among(row: Row, rows: Sequence[Row]) -> str:
    """What tells a row from the others, with network and data set where these differ."""
    return row.label if several(rows) else row.name


def paper_rows(table: str, paper: Path = PAPER) -> List[Row]:
    """The rows of a table of a paper, with the values of its CSV.

    Rows of another paper have recipes of their own: give each its ``file``.
    """
    found: Dict[Tuple, Dict[str, float]] = {}
    with paper.open(newline='') as file:
        for line in csv.DictReader(file):
            if line['table'] == table:
                metric, _, batch = line['metric'].partition('_bs')
                key = line['dataset'], line['model'], line['norm'], int(batch or 0)
                found.setdefault(key, {})[metric] = float(line['value'])
    return [
        Row(dataset, model, norm, norm, batch_size=batch, paper=values)
        for (dataset, model, norm, batch), values in found.items()
    ]

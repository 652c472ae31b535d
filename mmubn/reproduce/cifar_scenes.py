"""The data of the study of batches of two: CIFAR-10's objects on CIFAR-100's pictures."""

from pathlib import Path
from typing import Sequence, Tuple

from mmengine.config import Config
from mmengine.registry import DefaultScope

from ..cli.data_root import set_data_root
from ..cli.errors import CommandError


def make_cifar_scenes(data_root: Path, out: Path) -> Path:
    """Scenes of ``cifar10/`` and ``cifar100/``, as archives or class folders.

    1,200 scenes to train on, 500 to tune on and 1,000 to test on. The objects of the
    first two are of different training images of CIFAR-10, those of the last are of its
    test images; backgrounds and distractors are of CIFAR-100's likewise.
    """
    if out.exists():  # whole or not at all
        return out
    # Here, so that `list` starts quickly and detection alone needs no mmpretrain.
    from mmpretrain.datasets.categories import CIFAR10_CATEGORIES

    from ..datasets.pasted_scenes import Pictures, make_pasted_scenes

    read = {
        (name, split): _cifar(data_root / name, kind, split)
        for name, kind in (('cifar10', 'CIFAR10'), ('cifar100', 'CIFAR100'))
        for split in ('train', 'test')
    }
    splits = {}
    for name, count, split, first, last in (
        ('train', 1200, 'train', 0, 0.9),
        ('val', 500, 'train', 0.9, 1),
        ('test', 1000, 'test', 0, 1),
    ):
        parts = (_part(items, first, last) for items in read['cifar10', split])
        others = _part(read['cifar100', split][0], first, last)
        splits[name] = Pictures(*parts, others, count)
    make_pasted_scenes(out, splits, CIFAR10_CATEGORIES)
    return out


def _part(items: Sequence, first: float, last: float) -> Sequence:
    return items[round(len(items) * first) : round(len(items) * last)]


def _cifar(folder: Path, kind: str, split: str) -> Tuple[list, list]:
    """Images in BGR, and labels."""
    from mmpretrain.registry import DATASETS

    dataset = dict(type=kind, data_root='cifar', split=split, pipeline=[], download=False)
    cfg = Config(dict(train_dataloader=dict(dataset=dataset)))
    if not folder.is_dir():
        raise CommandError(f'--data-root: no folder {folder}; it needs cifar10/ and cifar100/')
    set_data_root(cfg, str(folder))
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        built = DATASETS.build(cfg.train_dataloader.dataset)
    infos = [built.get_data_info(index) for index in range(len(built))]
    images = [info['img'][..., ::-1] for info in infos]
    return images, [int(info['gt_label']) for info in infos]

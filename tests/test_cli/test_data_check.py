"""Data that is missing, and CIFAR from an archive and from class folders."""

import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import DATASETS
from told import told
from tool import CONFIGS

from mmubn.cli.data_check import check_data
from mmubn.cli.data_root import evaluate_on_train, set_data_root
from mmubn.cli.errors import CommandError

pytest.importorskip('mmpretrain')
SCOPE = 'mmpretrain'
CONFIG = CONFIGS / 'cifar100' / 'resnet50_bn_cifar100.py'


@pytest.fixture
def cfg() -> Config:
    return Config.fromfile(CONFIG)


def archive(root: Path, images: np.ndarray, monkeypatch) -> None:
    """Writes a CIFAR-100 of these images, labelled 0, 1, ..., as train and test."""
    from mmpretrain.datasets import CIFAR100

    folder = root / CIFAR100.base_folder
    folder.mkdir(parents=True)
    entry = dict(
        data=images.transpose(0, 3, 1, 2).reshape(len(images), -1),
        fine_labels=list(range(len(images))),
    )
    for name in ('train', 'test'):
        (folder / name).write_bytes(pickle.dumps(entry))
        # Without the sums of the published files.
        monkeypatch.setattr(CIFAR100, f'{name}_list', [[name, None]])


def test_nothing_there(cfg):
    assert told(check_data, cfg, ('train', 'val')) == (
        'train_dataloader.dataset.data_root: no cifar-100-python/train in data/cifar100; unpack '
        'cifar-100-python.tar.gz there, or name by --data-root DIR a folder that holds it, or '
        'train/ and test/ with a folder of images for each class, or download it by '
        '--cfg-options train_dataloader.dataset.download=True'
    )


def test_part_of_the_archive(cfg, tmp_path):
    folder = tmp_path / 'data' / 'cifar100' / 'cifar-100-python'
    folder.mkdir(parents=True)
    (folder / 'train').touch()
    with pytest.raises(CommandError, match='no cifar-100-python/test in data/cifar100'):
        check_data(cfg, ('train', 'val'))


def test_download_is_left_to_mmpretrain(cfg):
    cfg.train_dataloader.dataset.download = True
    check_data(cfg, ('train',))
    with pytest.raises(CommandError, match=r'^val_dataloader\.'):
        check_data(cfg, ('train', 'val'))


def test_class_folders_for_training_alone(cfg, tmp_path):
    (tmp_path / 'train' / 'apple').mkdir(parents=True)
    cv2.imwrite(str(tmp_path / 'train' / 'apple' / '0.png'), np.zeros((8, 8, 3), np.uint8))
    set_data_root(cfg, str(tmp_path))
    check_data(cfg, ('train',))
    missing = r'^val_dataloader\.dataset\.data_prefix: no folder .*/test; '
    with pytest.raises(CommandError, match=missing):
        check_data(cfg, ('train', 'val'))
    evaluate_on_train(cfg)
    check_data(cfg, ('train', 'val'))


def test_archive_and_class_folders_are_the_same_data(cfg, tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8)
    archive(tmp_path / 'data' / 'cifar100', images, monkeypatch)
    for split in ('train', 'test'):
        for label, image in enumerate(images):
            folder = tmp_path / 'folders' / split / f'class{label}'
            folder.mkdir(parents=True)
            cv2.imwrite(str(folder / 'image.png'), image[..., ::-1])
    check_data(cfg, ('train', 'val', 'test'))
    other = Config.fromfile(CONFIG)
    set_data_root(other, str(tmp_path / 'folders'))
    check_data(other, ('train', 'val', 'test'))
    for split in ('val', 'test'):
        samples = [
            {int(sample['data_samples'].gt_label): sample['inputs'] for sample in dataset}
            for dataset in (DATASETS.build(c[f'{split}_dataloader'].dataset) for c in (cfg, other))
        ]
        for label, image in enumerate(images):
            for sample in samples:
                assert np.array_equal(sample[label], image.transpose(2, 0, 1))

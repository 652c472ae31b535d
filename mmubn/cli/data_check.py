"""Checks that the data a config names is there."""

import inspect
import os.path as osp
from typing import Optional, Sequence

from mmengine.config import Config
from mmengine.registry import DATASETS

from .errors import CommandError
from .walk import walk

_REMEDY = '--data-root DIR points every dataset and evaluator at another folder'
_EVALUATION_REMEDY = f'{_REMEDY}, --eval-on-train evaluates on the training images'


def check_data(cfg: Config, splits: Sequence[str]) -> None:
    """Looks for the folders and annotation files of the datasets and evaluators.

    Remote paths, and datasets that download themselves, are left to mmengine. Of CIFAR's
    archives the files are looked for, not read.

    Args:
        cfg (Config): The resolved config.
        splits (Sequence[str]): Of 'train', 'val' and 'test', those to be used.

    Raises:
        CommandError: The first that is missing.
    """
    for split in splits:
        remedy = _REMEDY if split == 'train' else _EVALUATION_REMEDY
        key = f'{split}_dataloader'
        for path, node in walk(cfg.get(key), key):
            if 'data_root' not in node and 'ann_file' not in node:
                continue
            kind = _dataset_class(node)
            if kind is None or 'download' not in inspect.signature(kind).parameters:
                _check_dataset(path, node, remedy)
            elif hasattr(kind, 'base_folder') and not node.get('download', True):
                _check_cifar(path, node, kind)
        key = f'{split}_evaluator'
        for path, node in walk(cfg.get(key), key):
            if node.get('ann_file'):
                _check_file(f'{path}.ann_file', node['ann_file'], remedy)


def _dataset_class(dataset: dict) -> Optional[type]:
    kind = dataset.get('type')
    if not isinstance(kind, str):
        return kind
    with DATASETS.switch_scope_and_registry(dataset.get('_scope_')) as registry:
        return registry.get(kind)


def _check_cifar(path: str, dataset: dict, kind: type) -> None:
    root = dataset.get('data_root') or ''
    files = [osp.join(kind.base_folder, name) for name, _ in kind.train_list + kind.test_list]
    missing = [file for file in files if not osp.isfile(osp.join(root, file))]
    if missing:
        raise CommandError(
            f'{path}.data_root: no {missing[0]} in {root}; unpack {kind.filename} there, or name '
            'by --data-root DIR a folder that holds it, or train/ and test/ with a folder of '
            f'images for each class, or download it by --cfg-options {path}.download=True'
        )


def _check_dataset(path: str, dataset: dict, remedy: str) -> None:
    root = dataset.get('data_root') or ''
    if root:
        _check_folder(f'{path}.data_root', root, remedy)
    if dataset.get('ann_file'):
        _check_file(f'{path}.ann_file', osp.join(root, dataset['ann_file']), remedy)
    prefix = dataset.get('data_prefix') or {}
    if isinstance(prefix, str):
        prefix = {'': prefix}
    for name, folder in prefix.items():
        if folder:
            key = f'{path}.data_prefix.{name}'.rstrip('.')
            _check_folder(key, osp.join(root, folder), remedy)


def _check_folder(key: str, folder: str, remedy: str) -> None:
    if '://' not in folder and not osp.isdir(folder):
        raise CommandError(f'{key}: no folder {folder}; {remedy}')


def _check_file(key: str, file: str, remedy: str) -> None:
    if '://' not in file and not osp.isfile(file):
        raise CommandError(f'{key}: no file {file}; {remedy}')

"""Points a config at other data."""

import copy
import math
import os.path as osp
from typing import Any

from mmengine.config import Config

from ..walk import type_name, walk
from .errors import CommandError, warn

_DATA_KEYS = ('_dataloader', '_evaluator')


def set_data_root(cfg: Config, folder: str) -> None:
    """Replaces the data root of every dataset and evaluator.

    Every ``data_root`` becomes ``folder``, and every path that starts with the old one
    moves along, such as the ``ann_file`` of ``CocoMetric``. Paths relative to a
    ``data_root`` stay, so the folder needs the layout the config expects. For CIFAR it may
    also hold ``train/`` and ``test/`` with a folder of images for each class: then
    :class:`~mmubn.datasets.cached_image_folder.CachedImageFolder` reads it.

    Args:
        cfg (Config): Changed in place, in its ``*_dataloader`` and ``*_evaluator``.
        folder (str): The new root.

    Raises:
        CommandError: ``folder`` is none, no dataset has a ``data_root``, or they have several,
            which would become one.
    """
    if not osp.isdir(folder):
        raise CommandError(f'--data-root: {folder} is not a folder')
    keys = [key for key in cfg if key.endswith(_DATA_KEYS)]
    found = {
        path: osp.normpath(node['data_root'])
        for key in keys
        for path, node in walk(cfg[key], key)
        if node.get('data_root')
    }
    roots = list(dict.fromkeys(found.values()))
    if not roots:
        raise CommandError('--data-root: no dataset of the config has a data_root to replace')
    if len(roots) > 1:
        listed = ' '.join(f'{path}.data_root=DIR' for path in found)
        raise CommandError(
            f'--data-root: the datasets of the config have the roots {", ".join(roots)}, which '
            f'would become one; in place of it name each by --cfg-options {listed}'
        )
    for key in keys:  # new values, since test_dataloader may be the same object as val_dataloader
        cfg[key] = _moved(cfg[key], roots[0], folder)
        for _, node in walk(cfg[key], key):
            if type_name(node) in ('CIFAR10', 'CIFAR100'):
                _read_class_folders(node)


def _read_class_folders(cifar: dict) -> None:
    """Has a dataset of the standard archive read class folders, where there are any."""
    if any(osp.isdir(osp.join(cifar['data_root'], split)) for split in ('train', 'test')):
        cifar.pop('download', None)
        split = cifar.pop('split', 'train')  # mmpretrain's default
        cifar.update(type='CachedImageFolder', data_prefix=split)


def _moved(node: Any, root: str, folder: str) -> Any:
    if isinstance(node, dict):
        moved = {key: _moved(value, root, folder) for key, value in node.items()}
        if 'data_root' in moved:
            moved['data_root'] = folder
        return type(node)(moved)
    if isinstance(node, (list, tuple)):
        return type(node)(_moved(value, root, folder) for value in node)
    if isinstance(node, str) and osp.normpath(node).startswith(root + '/'):
        return osp.join(folder, osp.relpath(node, root))
    return node


def evaluate_on_train(cfg: Config) -> None:
    """Makes validation and test read the images that training reads, and says so.

    For a folder without a validation split, or to see whether a model fits its data. Where
    training takes a part of a dataset (``indices``), it is the same part, or less of it: an
    evaluation that takes the first n images takes the first n of these. Pipelines, samplers and
    metrics stay those of the evaluation.

    Args:
        cfg (Config): Changed in place.

    Raises:
        CommandError: There is no training data, or it is several datasets.
    """
    if cfg.get('train_dataloader') is None:
        raise CommandError('--eval-on-train: the config has no train_dataloader to take data from')
    train = _innermost(cfg.train_dataloader.dataset)
    for split in ('val', 'test'):
        if cfg.get(f'{split}_dataloader') is None:
            continue
        dataset = _innermost(cfg[f'{split}_dataloader'].dataset)
        first, most = dataset.get('indices'), train.get('indices') or math.inf
        for key in ('data_root', 'ann_file', 'data_prefix', 'split', 'indices'):
            dataset.pop(key, None)
            if key in train:
                dataset[key] = copy.deepcopy(train[key])
        # Not a list, nor the last n: those may be images that are held out from training.
        if isinstance(first, int) and isinstance(most, (int, float)) and 0 < first < most:
            dataset.indices = first
        for _, node in walk(cfg[f'{split}_evaluator'], f'{split}_evaluator'):
            if 'ann_file' in node:
                node['ann_file'] = osp.join(train.get('data_root') or '', train['ann_file'])
    warn('evaluating on the training images (--eval-on-train)')


def _innermost(dataset: dict) -> dict:
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    if 'datasets' in dataset:
        raise CommandError('--eval-on-train: a dataset of the config joins several')
    return dataset

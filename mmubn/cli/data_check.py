"""Checks that the data a config names is there, and is what the config takes it for."""

import inspect
import math
import os.path as osp
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Dict, Iterator, List, Optional, Sequence

from mmengine.config import Config
from mmengine.dist import get_world_size
from mmengine.registry import DATASETS
from mmengine.utils import is_seq_of

from ..walk import type_name, walk
from .coco_check import CocoFile, check_coco, check_evaluated
from .errors import CommandError, user_error, warn
from .folder_check import (
    Folders,
    Numbered,
    check_alike,
    check_images,
    check_numbers,
    labels_of_folders,
    lines_of,
    read_folders,
    read_labels,
    skips_foreign,
)
from .lookup import HOSTS, did_you_mean, find_class

_REMEDY = '--data-root DIR points every dataset and evaluator at another folder'
_EVALUATION_REMEDY = f'{_REMEDY}, --eval-on-train evaluates on the training images'
_PLACES = ('data_root', 'ann_file', 'data_prefix')


@dataclass(frozen=True)
class Data:
    """A dataset of the config, which is opened once, when it is first asked for."""

    path: str
    node: dict
    kind: type

    @cached_property
    def is_remote(self) -> bool:
        """See :func:`is_remote`; also where its pipeline reads the images from elsewhere."""
        return any(is_remote(node) for _, node in walk(self.node, self.path))

    @cached_property
    def dataset(self) -> Any:
        """The dataset, built and not loaded: its paths and classes are known.

        Raises:
            CommandError: It refuses its arguments.
        """
        prefix = self.node.get('data_prefix')
        if is_coco(self.kind) and (not isinstance(prefix, dict) or 'img' not in prefix):
            raise CommandError(
                f'{self.path}.data_prefix: must name the folder of the images, dict(img=...), '
                f'got {prefix!r}'
            )
        if is_custom(self.kind) and isinstance(prefix, dict) and 'img_path' not in prefix:
            raise CommandError(
                f'{self.path}.data_prefix: must name the folder of the images, as text or by '
                f'dict(img_path=...), got {dict(prefix)!r}'
            )
        refused = AssertionError, AttributeError, KeyError, TypeError, ValueError
        with user_error(*refused, of=f'{self.path}: {self.kind.__name__}'):
            return DATASETS.build({**self.node, 'pipeline': [], 'lazy_init': True})

    @cached_property
    def folders(self) -> Optional[Folders]:
        """See :func:`~mmubn.cli.folder_check.read_folders`; None where they are remote."""
        return None if self.is_remote else read_folders(self.path, self.node, self.dataset)

    @cached_property
    def labels(self) -> Dict[str, int]:
        """See :func:`~mmubn.cli.folder_check.read_labels`."""
        return read_labels(self.path, self.dataset)


def check_data(cfg: Config, splits: Sequence[str]) -> Dict[str, List[Data]]:
    """Looks for the folders and annotation files of the datasets and evaluators, and into them.

    COCO's annotation files are read, those of ``CustomDataset`` too, and class folders are
    compared across the splits. Remote paths, and datasets that download themselves, are left
    to mmengine. Of CIFAR's archives the files are looked for, not read.

    Args:
        cfg (Config): The resolved config.
        splits (Sequence[str]): Of 'train', 'val' and 'test', those to be used.

    Returns:
        dict[str, list[Data]]: The datasets of each of the splits.

    Raises:
        CommandError: The first that is missing, or does not fit.
    """
    found: Dict[str, List[Data]] = {}
    for split in splits:
        remedy = _REMEDY if split == 'train' else _EVALUATION_REMEDY
        found[split] = list(datasets(cfg, split))
        for data in found[split]:
            if data.is_remote:
                continue
            if 'download' not in inspect.signature(data.kind).parameters:
                _check_dataset(data.path, data.node, remedy)
            elif hasattr(data.kind, 'base_folder') and not data.node.get('download', True):
                _check_cifar(data.path, data.node, data.kind)
        for path, node in _evaluators(cfg, split):
            if isinstance(node.get('ann_file'), str) and node['ann_file'] and not is_remote(node):
                _check_file(f'{path}.ann_file', node['ann_file'], remedy)
    for split in splits:
        _check_coco_files(cfg, split, found[split])
    _check_folders(cfg, found)
    return found


def datasets(cfg: Config, split: str) -> Iterator[Data]:
    """The datasets of a split that read data, inside of those that join or repeat them."""
    key = f'{split}_dataloader'
    for path, node in walk(cfg.get(key), key):
        if any(name in node for name in _PLACES) and 'type' in node:
            kind = find_class(node, DATASETS)
            if inspect.isclass(kind):
                _check_metainfo(path, node, kind)
                yield Data(path, node, kind)


def _evaluators(cfg: Config, split: str) -> Iterator:
    key = f'{split}_evaluator'
    return walk(cfg.get(key), key)


def is_remote(node: dict) -> bool:
    """Whether a dict of a config names something outside of this machine's folders.

    mmengine reads it by another backend than that of local files, which only it can ask.
    """
    if (node.get('backend_args') or {}).get('backend', 'local') != 'local':
        return True
    prefix = node.get('data_prefix') or {}
    places = [node.get('data_root'), node.get('ann_file')]
    places += prefix.values() if isinstance(prefix, dict) else [prefix]
    return any(isinstance(place, str) and '://' in place for place in places)


def is_coco(kind: type) -> bool:
    """Whether mmdet reads it as it reads COCO."""
    return _loads_as(kind, 'CocoDataset')


def is_custom(kind: type) -> bool:
    """Whether mmpretrain reads it from class folders or a list of files and labels."""
    return skips_foreign(kind) or _loads_as(kind, 'CustomDataset')


def _loads_as(kind: type, name: str) -> bool:
    """Whether it is of that kind, and nobody but the hosts has changed how it reads."""
    owners = {
        method: next((base for base in kind.__mro__ if method in vars(base)), object)
        for method in ('load_data_list', 'parse_data_info', 'filter_data', '__init__')
    }
    hosts = all(owner.__module__.startswith(HOSTS) for owner in owners.values())
    return hosts and owners['load_data_list'].__name__ == name


def _check_metainfo(path: str, node: dict, kind: type) -> None:
    metainfo = node.get('metainfo')
    if metainfo is not None and not isinstance(metainfo, dict):
        raise CommandError(
            f'{path}.metainfo: must be a dict, got {metainfo!r}; write metainfo=dict(classes=(...))'
        )
    metainfo = metainfo or {}
    for key in metainfo:
        known = {'classes', *getattr(kind, 'METAINFO', {})}
        hint = did_you_mean(key, known)
        if key not in known and 'classes' not in metainfo and 'classes' in hint:
            raise CommandError(f"{path}.metainfo: nothing reads '{key}'{hint}")
    for key, classes in (
        (f'{path}.metainfo.classes', metainfo.get('classes')),
        (f'{path}.classes', node.get('classes')),
    ):
        if isinstance(classes, str) and osp.isfile(classes):
            classes = lines_of(key, classes)
        if classes is None:
            continue
        if isinstance(classes, str):
            raise CommandError(
                f'{key}: {classes!r} is a string, and no file of names; one class is written with '
                f"a comma, classes=('{classes}',)"
            )
        if not is_seq_of(classes, str) or not classes or len(set(classes)) < len(classes):
            raise CommandError(
                f'{key}: must be the names of the classes, each once, got {classes!r}'
            )


def _check_coco_files(cfg: Config, split: str, found: Sequence[Data]) -> None:
    metrics = [
        (path, node)
        for path, node in _evaluators(cfg, split)
        if type_name(node).endswith('CocoMetric')
    ]
    labelled = not any(node.get('format_only') for _, node in metrics)
    read: List[CocoFile] = []
    for data in found:
        if not is_coco(data.kind) or data.is_remote:
            continue
        dataset = data.dataset
        if not dataset.ann_file:
            raise CommandError(f'{data.path}: ann_file is left out; {data.kind.__name__} needs it')
        read.append(check_coco(data.path, data.node, dataset, labelled))
        _check_batches(cfg, split, data, len(read[-1].read_ids))
    for path, node in metrics:
        if len(found) == len(read) == 1 and node.get('ann_file') and not is_remote(node):
            truth = check_evaluated(
                f'{path}.ann_file', node['ann_file'], read[0], dataset.metainfo['classes']
            )
            if not node.get('format_only'):
                truth.check_evaluable(masks='segm' in (node.get('metric') or ()))
                _tell_unread(f'{path}.ann_file', truth, read[0], dataset.metainfo['classes'])


def _tell_unread(key: str, truth: CocoFile, coco: CocoFile, classes: Sequence[str]) -> None:
    used = [a for a in truth.annotations if truth.categories[a['category_id']] in classes]
    unread = {annotation['image_id'] for annotation in used}.difference(coco.read_ids)
    if unread:
        warn(
            f'{key}: {truth.file} has {len(unread)} images with annotations that the data set does '
            'not read: nothing is detected in them, which lowers the AP; name a file without them'
        )


def _check_folders(cfg: Config, found: Dict[str, List[Data]]) -> None:
    alike: List[Folders] = []
    numbered: List[Numbered] = []
    for split in dict.fromkeys(('train', *found)):
        for data in found[split] if split in found else datasets(cfg, split):
            if not is_custom(data.kind) or data.is_remote:
                continue
            dataset = data.dataset
            if split not in found and not osp.isdir(dataset.img_prefix):
                continue  # a test does not need the training images
            if dataset.with_label and dataset.ann_file:
                if split in found:
                    labels = labels_of_folders(data.labels)
                    numbered.append(Numbered(data.path, dataset.ann_file, labels))
                    _check_batches(cfg, split, data, _taken(data, len(data.labels)))
                continue
            folders = data.folders
            if folders is not None:
                alike.append(folders)
                labels = {name: label for label, name in enumerate(folders.names)}
                numbered.append(Numbered(data.path, folders.root, labels))
                if split in found:
                    number = check_images(folders, dataset)
                    _check_batches(cfg, split, data, _taken(data, number))
    check_alike(alike)
    check_numbers(numbered)


def _taken(data: Data, images: int) -> int:
    """How many of the images ``indices`` takes."""
    indices = data.node.get('indices')
    if indices is None:
        return images
    return min(abs(indices), images) if isinstance(indices, int) else len(indices)


def _check_batches(cfg: Config, split: str, data: Data, images: int) -> None:
    """Refuses a loader without a single batch, with which mmengine trains nothing without a word.

    Only where the images go to the processes in equal parts.
    """
    key = f'{split}_dataloader'
    loader = cfg[key]
    plain = type_name(loader.get('sampler') or {}) in ('', 'DefaultSampler')
    if data.path != f'{key}.dataset' or not plain or loader.get('batch_sampler'):
        return
    each, size = math.ceil(images / get_world_size()), loader.get('batch_size') or 1
    if loader.get('drop_last') and each < size:
        raise CommandError(
            f'{key}.drop_last=True: {each} images for each process are no whole batch of {size}, '
            f'so that none is read; give --cfg-options {key}.drop_last=False, or '
            f'{key}.batch_size={each}'
        )


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
    file = dataset.get('ann_file')
    if file and isinstance(file, str):  # else a dataset of somebody's own takes several
        _check_file(f'{path}.ann_file', osp.join(root, file), remedy)
    prefix = dataset.get('data_prefix') or {}
    if isinstance(prefix, str):
        prefix = {'': prefix}
    for name, folder in prefix.items():
        if folder and isinstance(folder, str):
            key = f'{path}.data_prefix.{name}'.rstrip('.')
            _check_folder(key, osp.join(root, folder), remedy)


def _check_folder(key: str, folder: str, remedy: str) -> None:
    if not osp.isdir(folder):
        raise CommandError(f'{key}: no folder {folder}; {remedy}')


def _check_file(key: str, file: str, remedy: str) -> None:
    if not osp.isfile(file):
        raise CommandError(f'{key}: no file {file}; {remedy}')

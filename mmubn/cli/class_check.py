"""Checks that the model has as many classes as the data."""

from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

from mmengine.config import Config
from mmengine.fileio import list_from_file
from torch import nn

from ..walk import type_name, walk
from .data_check import Data, datasets, is_coco, is_custom
from .errors import CommandError


def check_classes(cfg: Config, model: nn.Module, found: Dict[str, List[Data]]) -> None:
    """Compares ``num_classes`` of the heads, and top-k's k, with the datasets.

    Args:
        cfg (Config): The resolved config.
        model (Module): Its model.
        found (dict[str, list[Data]]): What :func:`~mmubn.cli.data_check.check_data` found.

    Raises:
        CommandError: They differ.
    """
    for split, there in found.items():
        for data in there:
            counted = _count(data)
            if counted is None:
                continue
            number, exact, source = counted
            _check_heads(cfg, model, number, exact, source)
            if split != 'train' and exact:
                _check_evaluator(cfg, split, number, source)


def dataset_classes(cfg: Config, split: str) -> Iterator[Tuple[str, Sequence[str]]]:
    """Path and class names of each dataset of a split that knows them."""
    for data in datasets(cfg, split):
        if is_custom(data.kind) or is_coco(data.kind):
            names = data.dataset.metainfo.get('classes')
            if names is None:
                names = data.folders.names if data.folders is not None else ()
            yield data.path, list(names)


def _count(data: Data) -> Optional[Tuple[int, bool, str]]:
    """The number of classes, whether the heads must have just as many, and where it is from."""
    if is_custom(data.kind) and not data.is_remote:
        dataset, folders = data.dataset, data.folders
        if not dataset.with_label:
            return None
        if folders is not None:
            return len(folders.names), True, f'class folders in {folders.root}'
        classes = dataset.metainfo.get('classes')
        if classes is None:
            number = max(data.labels.values()) + 1
            return number, False, f'labels in {dataset.ann_file}'
    else:
        classes = (data.node.get('metainfo') or {}).get('classes')
        if isinstance(classes, str):
            classes = list_from_file(classes)
        classes = classes or getattr(data.kind, 'METAINFO', {}).get('classes')
    # Things and stuff have heads of their own, and what is tracked is one class of many.
    others = any('Panoptic' in b.__name__ or 'Video' in b.__name__ for b in data.kind.__mro__)
    if not classes or others:
        return None
    return len(classes), True, f'classes of {data.path} ({data.kind.__name__})'


def _check_heads(cfg: Config, model: nn.Module, number: int, exact: bool, source: str) -> None:
    wrong = {
        key: value
        for key, value in head_classes(cfg, model)
        if (value != number if exact else value < number)
    }
    if wrong:
        found = ', '.join(f'{key}={value}' for key, value in wrong.items())
        options = ' '.join(f'{key}={number}' for key in wrong)
        at_least = '' if exact else 'at least '
        raise CommandError(
            f'{found}, and there are {at_least}{number} {source}; give --cfg-options {options}'
        )


def head_classes(cfg: Config, model: nn.Module) -> Iterator[Tuple[str, int]]:
    """Key and value of ``num_classes``, of each head that tells classes apart."""
    if 'language_model' in cfg.model:
        return  # the classes are given as text
    for name, module in model.named_modules():
        value = getattr(module, 'num_classes', None)
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        parts = name.split('.')
        # A region proposal has no class, and a map of stuff classes of its own.
        if 'RPN' in type(module).__name__ or {'rpn_head', 'semantic_head'} & {*parts}:
            continue
        if not any('head' in part for part in parts):
            continue
        yield _key(cfg, parts), value
    prepare = getattr(model, 'data_preprocessor', None)  # mmpretrain's makes labels into vectors
    makes_vectors = getattr(prepare, 'batch_augments', None) or getattr(prepare, 'to_onehot', False)
    if makes_vectors and hasattr(prepare, 'num_classes'):  # mmdet's augments know no classes
        place = 'data_preprocessor' if cfg.get('data_preprocessor') else 'model.data_preprocessor'
        yield f'{place}.num_classes', prepare.num_classes


def _key(cfg: Config, parts: List[str]) -> str:
    node: Any = cfg.model
    path = ['model']
    for part in parts:
        if isinstance(node, (list, tuple)) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, dict) and part in node:
            node = node[part]
        else:
            continue  # one dict for all stages
        path.append(part)
    name = 'num_classes'
    if isinstance(node, dict) and name not in node and 'num_things_classes' in node:
        name = 'num_things_classes'
    return '.'.join([*path, name])


def _check_evaluator(cfg: Config, split: str, number: int, source: str) -> None:
    key = f'{split}_evaluator'
    for path, node in walk(cfg.get(key), key):
        topk = node.get('topk')
        if topk is not None and type_name(node) == 'Accuracy':
            numbers = topk if isinstance(topk, (list, tuple)) else (topk,)
            if not numbers or not all(isinstance(number, int) for number in numbers):
                raise CommandError(f'{path}.topk: must be whole numbers, as 1,5, got {topk!r}')
            most = max(numbers)
            if most > number:
                raise CommandError(
                    f'{path}.topk={topk}, and there are {number} {source}; give '
                    f'--cfg-options {path}.topk=1,'
                )
        if isinstance(node.get('num_classes'), int) and node['num_classes'] != number:
            raise CommandError(
                f'{path}.num_classes={node["num_classes"]}, and there are {number} {source}; give '
                f'--cfg-options {path}.num_classes={number}'
            )

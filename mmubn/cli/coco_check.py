"""Checks that a COCO annotation file is what the config takes it for."""

import json
import os.path as osp
import sys
from collections import Counter
from typing import Any, Collection, Dict, List, Sequence

from mmengine.dist import is_main_process
from mmengine.utils import is_seq_of

from .errors import CommandError, listed, warn
from .folder_check import missing_files
from .lookup import did_you_mean

_ID = (int, float, str), 'a number or a text'
_NUMBER = (int, float), 'a number'
_TEXT = str, 'a text'
_ANYTHING = object, ''  # a box of what is used is looked at later
# What mmdet reads of each entry of a list, and of which types it must be.
_LISTS = dict(
    images=dict(id=_ID, file_name=_TEXT, width=_NUMBER, height=_NUMBER),
    annotations=dict(id=_ID, image_id=_ID, category_id=_ID, bbox=_ANYTHING, area=_NUMBER),
    categories=dict(id=_ID, name=_TEXT),
)
_LARGE = 100e6  # bytes; takes some seconds to read
_BOX = (
    'bbox must be [x, y, width, height] in pixels, inside of the image and at least 1 pixel wide '
    'and high, area above 0'
)
_MOST_LEFT_OUT = 0.01  # of the annotations: COCO itself has some


class CocoFile:
    """The content of an annotation file, sound in itself.

    Args:
        key (str): The key of the config that names it.
        file (str): Its path.
        labelled (bool): It must have annotations.

    Attributes:
        read_ids (Collection): Ids of the images that the data set reads, once they are known.

    Raises:
        CommandError: It is no JSON, lacks something, or refers to what it has not.
    """

    def __init__(self, key: str, file: str, labelled: bool = True) -> None:
        self.key, self.file = key, file
        content = self._read()
        for name in _LISTS:
            if name == 'annotations' and not labelled:
                content.setdefault(name, [])
            if not isinstance(content, dict) or not isinstance(content.get(name), list):
                self.fail(f"has no list '{name}'; COCO's layout has {', '.join(_LISTS)}")
            self._check_entries(name, content[name])
        self.images: Dict[Any, dict] = {image['id']: image for image in content['images']}
        self.read_ids: Collection = self.images.keys()
        self.annotations: List[dict] = content['annotations']
        self.categories: Dict[Any, str] = {c['id']: c['name'] for c in content['categories']}
        self._check_references('image_id', self.images, 'images')
        self._check_references('category_id', self.categories, 'categories')

    def fail(self, what: str) -> None:
        """Raises the error that says it of this file."""
        raise CommandError(f'{self.key}: {self.file} {what}')

    def _read(self) -> Any:
        size = osp.getsize(self.file)
        if size > _LARGE and is_main_process():
            print(f'checking {self.file} ({size / 1e6:.0f} MB)', file=sys.stderr)
        try:
            with open(self.file, encoding='utf-8') as file:
                return json.load(file)
        except OSError as error:
            self.fail(f'cannot be read ({error.strerror})')
        except (ValueError, RecursionError) as error:  # of JSON or of Unicode
            reason = 'it is empty' if size == 0 else error
            self.fail(f'is not whole JSON ({reason}); copy or export it again')

    def _check_entries(self, name: str, entries: list) -> None:
        for index, entry in enumerate(entries):
            absent = [k for k in _LISTS[name] if not isinstance(entry, dict) or k not in entry]
            if absent:
                self.fail(f"has no '{absent[0]}' in {name}[{index}]; mmdet needs it in each")
            for key, (kinds, wanted) in _LISTS[name].items():
                if not isinstance(entry[key], kinds):
                    self.fail(f'has {key}={entry[key]!r} in {name}[{index}]; it must be {wanted}')
            crowd = entry.get('iscrowd')
            if crowd not in (None, 0, 1):
                self.fail(
                    f'has iscrowd={crowd!r} in {name}[{index}]; it must be 0 or, for a crowd, 1'
                )
        ids = Counter(entry['id'] for entry in entries)
        twice = [identity for identity, count in ids.items() if count > 1]
        if twice:
            self.fail(f'has the id {twice[0]!r} twice in {name}; each needs its own')

    def check_evaluable(self, masks: bool) -> None:
        """Raises where pycocotools would in the first evaluation, after an epoch of training.

        It keeps the id of what a detection matches as a number, and 0 there stands for nothing.
        """
        for annotation in self.annotations:
            try:
                number = float(annotation['id'])
            except ValueError:
                self.fail(
                    f'has the id {annotation["id"]!r} in annotations; the evaluator needs numbers '
                    'there, so number them from 1'
                )
            if number == 0:
                warn(
                    f'{self.key}: {self.file} has the annotation id 0, and the evaluator counts '
                    'what detects it as wrong, which lowers the AP; number them from 1'
                )
            if annotation.get('iscrowd') is None:
                what = 'iscrowd=None' if 'iscrowd' in annotation else "no 'iscrowd'"
                self.fail(
                    f'has {what} in annotation {annotation["id"]!r}; the evaluator needs 0 or, '
                    'for a crowd, 1 in each'
                )
            if masks:
                self.check_mask(annotation, points=3)

    def check_mask(self, annotation: dict, points: int = 0) -> None:
        """Raises where a segmentation is none of COCO's.

        Args:
            annotation (dict): Whose it is.
            points (int): The fewest points of a polygon.
        """
        value, image = annotation.get('segmentation'), self.images[annotation['image_id']]
        if isinstance(value, dict):
            size = [image['height'], image['width']]
            fits, wanted = value.get('size') == size and 'counts' in value, f'size={size}, counts'
        else:
            wanted = 'a list of polygons [x1, y1, x2, y2, ...] of at least 3 points'
            polygons = value if is_seq_of(value, list) else []
            sound = [is_seq_of(p, (int, float)) and len(p) >= 2 * points for p in polygons]
            fits = any(sound) and all(sound)
        if not fits:
            shown = repr(value) if len(repr(value)) < 60 else f'{repr(value)[:56]} ...'
            self.fail(
                f'has segmentation={shown} in annotation {annotation["id"]!r}; it must be {wanted}'
            )

    def _check_references(self, key: str, known: Dict[Any, Any], name: str) -> None:
        stray = [entry for entry in self.annotations if entry[key] not in known]
        if stray:
            self.fail(
                f'has {len(stray)} annotations of {len(self.annotations)} whose {key} is not in '
                f'its {name} (annotation {stray[0]["id"]!r}: {stray[0][key]!r}), which mmdet '
                'leaves out without a word; take them out, or add what they refer to'
            )


def check_coco(path: str, node: dict, dataset: Any, labelled: bool = True) -> CocoFile:
    """Compares a dataset's annotation file with its classes and its images.

    Args:
        path (str): Where the dataset stands in the config.
        node (dict): What stands there.
        dataset (CocoDataset): The dataset, not yet loaded.
        labelled (bool): It needs annotations.

    Raises:
        CommandError: They do not fit.
    """
    coco = CocoFile(f'{path}.ann_file', dataset.ann_file, labelled)
    classes = dataset.metainfo['classes']
    _check_classes(path, node, coco, classes)
    if not coco.images:
        coco.fail('has no images')
    used = {identity for identity, name in coco.categories.items() if name in classes}
    meant = [a for a in coco.annotations if a['category_id'] in used and not a.get('ignore')]
    read = [a for a in meant if _is_read(coco, a)]
    if labelled and all(a.get('iscrowd') for a in read):
        reason = 'has no annotations'
        if coco.annotations:
            reason = f'has no annotation that can be used: {_BOX}, iscrowd and ignore 0'
        coco.fail(f'{reason}; of {len(coco.images)} images none would teach anything')
    if not dataset.test_mode and len(meant) - len(read) > _MOST_LEFT_OUT * len(meant):
        first = next(a for a in meant if not _is_read(coco, a))
        warn(
            f'{coco.key}: mmdet leaves out {len(meant) - len(read)} of {len(meant)} annotations of '
            f'{coco.file}, such as {first["id"]!r} with bbox={first["bbox"]}, '
            f'area={first["area"]}: {_BOX}'
        )
    _check_masks(path, node, coco, read)
    images = _read_images(dataset, coco, used)
    coco.read_ids = {image['id'] for image in images}
    missing = missing_files(dataset.data_prefix['img'], [image['file_name'] for image in images])
    if missing:
        raise CommandError(
            f'{path}.data_prefix.img: {dataset.data_prefix["img"]} has no {missing[0]}; '
            f'{len(missing)} of {len(coco.images)} images of {dataset.ann_file} are missing; '
            'name the folder of these images, or leave them out of the file'
        )
    return coco


def check_evaluated(key: str, file: str, coco: CocoFile, classes: Sequence[str]) -> CocoFile:
    """Whether an evaluator's annotation file fits the data set that it evaluates.

    Args:
        key (str): Where the config names the file.
        file (str): Its path.
        coco (CocoFile): What the data set reads.
        classes (Sequence[str]): Of the data set.

    Returns:
        CocoFile: What the evaluator reads.

    Raises:
        CommandError: It is of other images, or numbers the classes otherwise.
    """
    if osp.realpath(file) == osp.realpath(coco.file):
        return coco
    other = CocoFile(key, file)
    strange = [identity for identity in coco.images if identity not in other.images]
    if strange:
        other.fail(
            f'lacks images of {coco.key}, {coco.file}: {len(strange)} of '
            f'{len(coco.images)} ids are missing, as {strange[0]!r}; name the same file in both'
        )
    for identity, image in coco.images.items():
        names = [osp.basename(found['file_name']) for found in (other.images[identity], image)]
        if names[0] != names[1]:
            other.fail(
                f'has image {identity!r} as {names[0]}, and {coco.key}, {coco.file}, as '
                f'{names[1]}: it is of other images; name the same file in both'
            )
    numbered = [[n for n in c.categories.values() if n in classes] for c in (coco, other)]
    if numbered[0] != numbered[1]:
        other.fail(
            f'numbers the classes {listed(numbered[1])}, and {coco.key}, {coco.file}, '
            f'{listed(numbered[0])}; name the same file in both'
        )
    return other


def _check_classes(path: str, node: dict, coco: CocoFile, classes: Sequence[str]) -> None:
    names = list(coco.categories.values())
    own = 'metainfo.classes' if 'classes' in (node.get('metainfo') or {}) else 'metainfo'
    key, file = f'{path}.{own}', coco.file
    absent = [name for name in classes if name not in names]
    fix = f'write metainfo=dict(classes={tuple(names)!r})'
    if len(names) > 20:
        fix = "write the names of its 'categories', in their order, in metainfo=dict(classes=...)"
    if absent:
        whose = '' if own == 'metainfo.classes' else f' (those of {node["type"]})'
        hint = did_you_mean(absent[0], names) if len(absent) < len(classes) else ''
        raise CommandError(
            f'{key}: {listed(absent)} of the {len(classes)} classes{whose} are no categories of '
            f'{file}{hint}; its categories are {listed(names)}: {fix} in every dataset, and '
            f'num_classes={len(names)} in the heads'
        )
    found = [name for name in names if name in classes]
    twice = [name for name, count in Counter(found).items() if count > 1]
    if twice:
        coco.fail(
            f"has two categories of the name '{twice[0]}', and mmdet would number both; rename one"
        )
    if found != list(classes):
        raise CommandError(
            f'{key}: mmdet numbers the classes in the order of the categories in {file}, which is '
            f'{listed(found)}, and not as here, {listed(classes)}; write '
            f'classes={tuple(found)!r}, or the same order into the file'
        )
    left_out = Counter(
        coco.categories[a['category_id']]
        for a in coco.annotations
        if coco.categories[a['category_id']] not in classes
    )
    if left_out:
        warn(
            f'{key}: {sum(left_out.values())} annotations of {file} are left out, of '
            f'categories that are not named: {listed(list(left_out))}'
        )


def _is_read(coco: CocoFile, annotation: dict) -> bool:
    """As ``CocoDataset.parse_data_info`` judges it, of what has no ``ignore``."""
    image, box = coco.images[annotation['image_id']], annotation['bbox']
    if not is_seq_of(box, (int, float)) or len(box) != 4:
        coco.fail(
            f'has bbox={box!r} in annotation {annotation["id"]!r}; it must be four numbers, '
            '[x, y, width, height]'
        )
    x, y, width, height = box
    overlaps_x = min(x + width, image['width']) > max(x, 0)
    overlaps_y = min(y + height, image['height']) > max(y, 0)
    return overlaps_x and overlaps_y and min(width, height) >= 1 and annotation['area'] > 0


def _check_masks(path: str, node: dict, coco: CocoFile, annotations: List[dict]) -> None:
    pipeline = node.get('pipeline') or ()
    if not any(isinstance(step, dict) and step.get('with_mask') for step in pipeline):
        return
    without = [a['id'] for a in annotations if not a.get('segmentation')]
    if without:
        coco.fail(
            f'has no segmentation in {len(without)} of {len(annotations)} annotations '
            f'({without[0]!r}), and the pipeline of {path} loads masks (with_mask=True); annotate '
            'them, or train a model without mask head'
        )
    for annotation in annotations:
        coco.check_mask(annotation)


def _read_images(dataset: Any, coco: CocoFile, used: Collection) -> List[dict]:
    """Those that ``CocoDataset.filter_data`` and ``indices`` leave."""
    images = list(coco.images.values())
    cfg = getattr(dataset, 'filter_cfg', None)
    if not dataset.test_mode and cfg:
        if cfg.get('filter_empty_gt'):
            ids = {a['image_id'] for a in coco.annotations if a['category_id'] in used}
            images = [image for image in images if image['id'] in ids]
        least = cfg.get('min_size', 0)
        images = [image for image in images if min(image['width'], image['height']) >= least]
    if not images:
        coco.fail(f'has no image that filter_cfg={dict(cfg)} leaves')
    indices = getattr(dataset, '_indices', None)
    if isinstance(indices, int):
        return images[:indices] if indices >= 0 else images[indices:]
    if indices is None:
        return images
    beyond = [index for index in indices if not -len(images) <= index < len(images)]
    if beyond:
        coco.fail(f'has {len(images)} images that are read, and indices names {beyond[0]}')
    return [images[index] for index in indices]

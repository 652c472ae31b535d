"""Detection scenes made of pictures: small ones pasted at varied sizes on varied backgrounds.

Real textures in COCO layout, for studies on a CPU. The objects of a scene are pasted among
distractors, pictures of other classes that are pasted alike and have no label: so an edge
says nothing, and a detector has to tell the classes apart.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import cv2
import numpy as np
from numpy.random import Generator
from tqdm import tqdm

from .drawing import SETTINGS_FILE, read_settings, write_split

_VERSION = 1  # of the pasting: another version is another data set
_SIZES = 18, 56  # of the shorter side of an object or distractor, in pixels
_MAX_OVERLAP = 0.1  # of the smaller of two
_TRIES = 20  # places for one, before it is left out


class Pictures(NamedTuple):
    """What the scenes of one split are made of.

    Attributes:
        objects (Sequence[np.ndarray]): uint8 (h, w, 3), BGR.
        labels (Sequence[int]): Their classes.
        others (Sequence[np.ndarray]): Of other classes, for backgrounds and distractors.
        count (int): How many scenes to make of them.
    """

    objects: Sequence[np.ndarray]
    labels: Sequence[int]
    others: Sequence[np.ndarray]
    count: int


def make_pasted_scenes(
    out_dir: Union[str, Path],
    splits: Dict[str, Pictures],
    classes: Sequence[str],
    size: int = 96,
    seed: int = 0,
) -> bool:
    """Writes scenes in COCO layout: ``annotations/instances_SPLIT.json`` and ``SPLIT/*.png``.

    The same arguments give the same bytes. The folder is there whole or not at all; one
    that is there is left as it is.

    Args:
        out_dir (str | Path): The folder.
        splits (dict[str, Pictures]): Such as train, val and test.
        classes (Sequence[str]): Names of the labels.
        size (int): Width and height in pixels. Default: 96.
        seed (int): Default: 0.

    Returns:
        bool: Whether anything was written.

    Raises:
        FileExistsError: ``out_dir`` holds something else, or other scenes.
    """
    out_dir = Path(out_dir)
    counts = {name: pictures.count for name, pictures in splits.items()}
    settings = dict(version=_VERSION, counts=counts, size=size, seed=seed)
    if out_dir.exists():
        if read_settings(out_dir) == settings:
            return False
        raise FileExistsError(f'{out_dir} holds other scenes or none: move it away')
    partial = out_dir.with_name(f'{out_dir.name}.partial')
    shutil.rmtree(partial, ignore_errors=True)
    (partial / 'annotations').mkdir(parents=True)
    categories = [dict(id=label + 1, name=name) for label, name in enumerate(classes)]
    for stream, (name, pictures) in enumerate(splits.items()):
        write_split(partial, name, size, _scenes(name, pictures, size, seed, stream), categories)
    (partial / SETTINGS_FILE).write_text(json.dumps(settings))
    os.replace(partial, out_dir)
    return True


def _scenes(name: str, pictures: Pictures, size: int, seed: int, stream: int) -> Iterator:
    """Of one split, as :func:`write_split` takes them."""
    for number in tqdm(range(pictures.count), desc=f'pasting {name}', mininterval=1):
        rng = np.random.default_rng([seed, stream, number])
        image, boxes, labels = paste_scene(rng, pictures, size)
        annotations = [
            dict(iscrowd=0, category_id=label + 1, bbox=box, area=box[2] * box[3])
            for box, label in zip(boxes, labels)
        ]
        yield number + 1, f'{number:06d}.png', cv2.imencode('.png', image)[1], annotations


def paste_scene(
    rng: Generator, pictures: Pictures, size: int
) -> Tuple[np.ndarray, List[List[int]], List[int]]:
    """Makes one scene of 1 to 4 objects and 1 to 4 distractors.

    Args:
        rng (Generator): Where all randomness comes from.
        pictures (Pictures): What it is made of.
        size (int): Width and height in pixels.

    Returns:
        tuple: The image, uint8 (size, size, 3); for each object the box (left, top, width,
        height) and the label.
    """
    image = _background(rng, pictures.others, size)
    wanted = [True] * rng.integers(1, 5) + [False] * rng.integers(1, 5)
    taken: List[List[int]] = []
    boxes, labels = [], []
    for is_object in rng.permutation(wanted):
        source = pictures.objects if is_object else pictures.others
        index = int(rng.integers(len(source)))
        box = _place(rng, taken, size)
        if box is None:
            continue
        left, top, width, height = box
        interpolation = cv2.INTER_AREA if width < 32 else cv2.INTER_CUBIC
        patch = cv2.resize(source[index], (width, height), interpolation=interpolation)
        if rng.random() < 0.5:
            patch = patch[:, ::-1]
        image[top : top + height, left : left + width] = patch
        taken.append(box)
        if is_object:
            boxes.append(box)
            labels.append(int(pictures.labels[index]))
    return image, boxes, labels


def _background(rng: Generator, others: Sequence[np.ndarray], size: int) -> np.ndarray:
    """A picture enlarged by 3 to 6, with its contrast lowered at random."""
    picture = others[rng.integers(len(others))]
    side = max(4, round(picture.shape[0] / rng.uniform(1, 2)))
    top, left = (rng.integers(length - side + 1) for length in picture.shape[:2])
    crop = picture[top : top + side, left : left + side]
    image = cv2.resize(crop, (size, size), interpolation=cv2.INTER_CUBIC).astype(np.float32)
    contrast = rng.uniform(0.4, 1)
    return (image * contrast + image.mean() * (1 - contrast)).clip(0, 255).astype(np.uint8)


def _place(rng: Generator, taken: Sequence[Sequence[int]], size: int) -> Optional[List[int]]:
    """A box that overlaps the taken ones little, or None."""
    for _ in range(_TRIES):
        side = np.exp(rng.uniform(*np.log(_SIZES)))
        width, height = np.rint(side * rng.permutation([1, rng.uniform(1, 1.4)])).astype(int)
        left, top = (int(rng.integers(size - length + 1)) for length in (width, height))
        box = [left, top, int(width), int(height)]
        if all(_overlap(box, other) <= _MAX_OVERLAP for other in taken):
            return box
    return None


def _overlap(a: Sequence[int], b: Sequence[int]) -> float:
    """Common area by that of the smaller box."""
    sides = (min(a[i] + a[i + 2], b[i] + b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    width, height = (max(0, side) for side in sides)
    return width * height / min(a[2] * a[3], b[2] * b[3])

"""Synthetic detection scenes in COCO layout, with polygon masks that are exact to the pixel.

Ellipses, rectangles and triangles of varied size, proportion, rotation and texture
lie over each other, on a muted, uneven background and among unlabelled bars. Each is
painted over what is there already, so the mask of an instance is the pixels that
nothing was painted over, and its polygons run along the edges of pixels: rasterising
them gives these pixels back.
"""

import json
import shutil
from pathlib import Path
from typing import Iterator, List, NamedTuple, Tuple, Union

import cv2
import numpy as np
import shapely
from numpy.random import Generator
from tqdm import tqdm

from ..writing import replace_text
from .drawing import SETTINGS_FILE, coverage, on_circle, read_settings, rotation, write_split

CLASSES = ('ellipse', 'rectangle', 'triangle')

_DISTRACTOR = 'bar'
_VERSION = 2  # of the drawing: another version is another data set
_MIN_VISIBLE = 0.4  # of what an instance would show alone, in an endless image
_MIN_PIXELS = 24
_MAX_TILT = np.deg2rad(20)


class Instance(NamedTuple):
    """A labelled object: index into :data:`CLASSES` and visible pixels, bool (size, size)."""

    label: int
    mask: np.ndarray


def make_scenes(
    out_dir: Union[str, Path],
    num_train: int = 600,
    num_val: int = 150,
    size: int = 128,
    seed: int = 0,
) -> bool:
    """Writes scenes in COCO layout.

    The folder gets ``annotations/instances_{train,val}.json``, the images in
    ``train/`` and ``val/``, and ``scenes.json``, which marks it as made here and says
    whether it is finished. The same arguments give the same bytes; train and val come
    from different streams of random numbers. A finished folder of these arguments is
    left as it is; one that was interrupted, or has other arguments, is made anew.

    Args:
        out_dir (str | Path): The folder.
        num_train (int): Number of training images.
        num_val (int): Number of held-out images.
        size (int): Width and height in pixels, at least 64.
        seed (int): Seed, not negative.

    Returns:
        bool: Whether anything was written.

    Raises:
        FileExistsError: ``out_dir`` holds something that was not made here.
        ValueError: An argument out of its range.
    """
    settings = dict(version=_VERSION, num_train=num_train, num_val=num_val, size=size, seed=seed)
    for name, least in (('num_train', 1), ('num_val', 1), ('size', 64), ('seed', 0)):
        if settings[name] < least:
            raise ValueError(f'{name} must be at least {least}, got {settings[name]}')
    out_dir = Path(out_dir)
    marker = out_dir / SETTINGS_FILE
    made = read_settings(out_dir) or {}
    if made == {**settings, 'finished': True}:
        return False
    ours = made.keys() == {*settings, 'finished'}
    if not ours and out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise FileExistsError(
            f"'{out_dir}' holds no {SETTINGS_FILE} of such scenes, so it was not made here and is "
            'left alone: move it away or name another folder'
        )
    out_dir.mkdir(parents=True, exist_ok=True)
    replace_text(marker, json.dumps({**settings, 'finished': False}))
    for name in ('annotations', 'train', 'val'):
        shutil.rmtree(out_dir / name, ignore_errors=True)
    (out_dir / 'annotations').mkdir()
    categories = [
        dict(id=label + 1, name=name, supercategory='shape') for label, name in enumerate(CLASSES)
    ]
    info = dict(description='Synthetic scenes of mmubn', version=str(_VERSION))
    first_id = 1
    for stream, (split, count) in enumerate((('train', num_train), ('val', num_val))):
        ids = range(first_id, first_id + count)
        scenes = _scenes(out_dir / split, ids, size, seed, stream)
        write_split(out_dir, split, size, scenes, categories, info=info)
        first_id += count
    replace_text(marker, json.dumps({**settings, 'finished': True}))
    return True


def draw_scene(rng: Generator, size: int = 128) -> Tuple[np.ndarray, List[Instance]]:
    """Draws one scene.

    A shape that would hide too much of another one, or of which too little would be
    seen, is not drawn: so everything that is seen of a class is annotated.

    Args:
        rng (Generator): Where all randomness comes from.
        size (int): Width and height in pixels.

    Returns:
        tuple[np.ndarray, list[Instance]]: The image, uint8 (size, size, 3), and its
        instances, the lowest first.
    """
    image = _texture(rng, size, _colour(rng, saturation=(0, 0.3), value=(0.1, 0.6)), contrast=25)
    classes = rng.choice(CLASSES, rng.integers(1, 6))
    distractors = [_DISTRACTOR] * rng.integers(0, 2)
    drawn: List[str] = []
    needed: List[float] = []  # pixels that have to stay visible, of each that is drawn
    owner = np.full((size, size), -1)  # index into `drawn` of what is seen
    for name in rng.permutation([*classes, *distractors]):
        for _ in range(20):  # places to try
            cover, area = _silhouette(rng, name, size)
            attempt = np.where(cover >= 0.5, len(drawn), owner)
            visible = np.bincount(attempt[attempt >= 0], minlength=len(drawn) + 1)
            least = max(_MIN_PIXELS, _MIN_VISIBLE * area)
            if np.all(visible >= [*needed, least]):
                break
        else:
            continue
        colour = _contrasting_colour(rng, image[cover >= 0.5].mean(0))
        image += cover[..., None] * (_texture(rng, size, colour, contrast=10) - image)
        owner = attempt
        drawn.append(name)
        needed.append(least)
    image += rng.normal(0, rng.uniform(1, 6), image.shape)
    instances = [
        Instance(CLASSES.index(name), owner == index)
        for index, name in enumerate(drawn)
        if name in CLASSES
    ]
    return image.clip(0, 255).astype(np.uint8), instances


def mask_to_polygons(mask: np.ndarray) -> List[List[float]]:
    """Outlines of a mask along pixel edges, as a COCO segmentation.

    A COCO segmentation is a union of polygons without holes, so a mask with a hole is
    cut along the hole's left side.

    Args:
        mask (np.ndarray): Bool (H, W).

    Returns:
        list[list[float]]: Disjoint polygons x0, y0, x1, y1, ... which pycocotools
        rasterises to exactly ``mask``.
    """
    steps = np.diff(mask.astype(np.int8), axis=1, prepend=0, append=0)
    rows, starts = np.nonzero(steps == 1)
    ends = np.nonzero(steps == -1)[1]
    region = shapely.union_all(shapely.box(starts, rows, ends, rows + 1)).simplify(0)
    parts = shapely.get_parts(region)
    holes = [hole for part in parts for hole in part.interiors]
    if holes:
        right = np.arange(mask.shape[1]) >= holes[0].bounds[0]
        return mask_to_polygons(mask & ~right) + mask_to_polygons(mask & right)
    return [np.ravel(part.exterior.coords[:-1]).tolist() for part in parts]


def _scenes(folder: Path, ids: range, size: int, seed: int, stream: int) -> Iterator:
    """Of one split, as :func:`write_split` takes them."""
    for image_id in tqdm(ids, desc=f'drawing {folder}', mininterval=1):
        # A stream for each image: it does not depend on how many others are asked for.
        rng = np.random.default_rng([seed, stream, image_id - ids[0]])
        image, instances = draw_scene(rng, size)
        jpeg = cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_QUALITY, 95])[1]
        yield image_id, f'{image_id:06d}.jpg', jpeg, [*map(_annotate, instances)]


def _annotate(instance: Instance) -> dict:
    ys, xs = np.nonzero(instance.mask)
    left, top = int(xs.min()), int(ys.min())
    return dict(
        category_id=instance.label + 1,
        bbox=[left, top, int(xs.max()) + 1 - left, int(ys.max()) + 1 - top],
        area=len(xs),
        iscrowd=0,
        segmentation=mask_to_polygons(instance.mask),
    )


def _silhouette(rng: Generator, name: str, size: int) -> Tuple[np.ndarray, float]:
    """A shape somewhere in the image: coverage of every pixel in [0, 1], and its whole area."""
    radius = np.exp(rng.uniform(np.log(14), np.log(40))) * size / 128
    placed = radius * rotation(rng.uniform(-_MAX_TILT, _MAX_TILT))
    centre = rng.uniform(0.05 * size, 0.95 * size, 2)
    outline = (_outline(rng, name) @ placed + centre).astype(np.float32)
    # Half a pixel of the canvas, as OpenCV's coordinates are those of pixel centres.
    return coverage([outline], size, shift=0.5), cv2.contourArea(outline)


def _outline(rng: Generator, name: str) -> np.ndarray:
    """Outline of a shape of about unit radius, (points, 2)."""
    if name == 'ellipse':
        return on_circle(48) * _proportions(rng)
    if name == 'rectangle':
        return _box(*_proportions(rng))
    if name == 'triangle':
        return on_circle(3, rng.uniform(-0.3, 0.3, 3)) * _proportions(rng)
    bar = _box(1.5, rng.uniform(0.05, 0.12))
    return bar if rng.random() < 0.5 else bar[:, ::-1]


def _proportions(rng: Generator) -> np.ndarray:
    """Half width and half height, the longer of them 1."""
    return rng.permutation([1, rng.uniform(0.5, 1)])


def _box(half_width: float, half_height: float) -> np.ndarray:
    return np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) * [half_width, half_height]


def _texture(rng: Generator, size: int, colour: np.ndarray, contrast: float) -> np.ndarray:
    """A plane of about one colour, float32 (size, size, 3): a slope, stripes or blotches."""
    kind = rng.choice(['slope', 'stripes', 'blotches'])
    if kind == 'blotches':
        cells = rng.integers(4, 24)
        noise = rng.normal(0, 0.6, (cells, cells)).astype(np.float32)
        field = cv2.resize(noise, (size, size), interpolation=cv2.INTER_CUBIC)
    else:
        angle = rng.uniform(0, 2 * np.pi)
        y, x = np.mgrid[:size, :size] * 2 / size - 1
        field = np.cos(angle) * x + np.sin(angle) * y
        if kind == 'stripes':
            field = np.sin(field * rng.uniform(8, 40))
    return (colour + field[..., None] * rng.uniform(-contrast, contrast, 3)).astype(np.float32)


def _contrasting_colour(rng: Generator, other: np.ndarray) -> np.ndarray:
    while True:
        colour = _colour(rng, saturation=(0.5, 1), value=(0.6, 1))
        if np.abs(colour - other).max() > 60:
            return colour


def _colour(
    rng: Generator, saturation: Tuple[float, float], value: Tuple[float, float]
) -> np.ndarray:
    """Any hue, with the other two from ranges in [0, 1]; as numbers up to 255."""
    hsv = np.float32([[[rng.uniform(0, 360), rng.uniform(*saturation), rng.uniform(*value)]]])
    return 255 * cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)[0, 0]

"""Images of single shapes, drawn when the dataset is built: classification without data."""

from typing import List

import cv2
import numpy as np
from mmpretrain.datasets import BaseDataset
from numpy.random import Generator

from .drawing import coverage, on_circle, rotation

CLASSES = ('circle', 'triangle', 'square', 'pentagon', 'hexagon', 'star', 'cross', 'ring')

_SPLITS = ('train', 'test')


class Shapes(BaseDataset):
    """Light shapes of eight classes on dark backgrounds, under noise and behind a bar.

    Samples have ``img``, uint8 (size, size, 3) in RGB, and ``gt_label``, the index into
    :data:`CLASSES`. The classes take turns. An image depends on ``split``, ``seed`` and
    its number alone.

    Args:
        split (str): 'train' or 'test', which come from different random numbers.
        count (int): Number of images.
        size (int): Width and height in pixels. Default: 32.
        seed (int): Default: 0.
        **kwargs: Those of mmpretrain's ``BaseDataset``.

    Raises:
        ValueError: ``split`` is another, or ``count`` is not positive.
    """

    METAINFO = {'classes': CLASSES}

    def __init__(self, split: str, count: int, size: int = 32, seed: int = 0, **kwargs) -> None:
        if split not in _SPLITS:
            raise ValueError(f"split must be 'train' or 'test', got {split!r}")
        if count < 1:
            raise ValueError(f'count must be positive, got {count}')
        self.split, self.count, self.size, self.seed = split, count, size, seed
        super().__init__(ann_file='', **kwargs)

    def load_data_list(self) -> List[dict]:
        """Draws the images."""
        return [self._draw(number) for number in range(self.count)]

    def _draw(self, number: int) -> dict:
        rng = np.random.default_rng([self.seed, _SPLITS.index(self.split), number])
        label = number % len(CLASSES)
        return dict(img=draw_shape(rng, CLASSES[label], self.size), gt_label=label)


def draw_shape(rng: Generator, name: str, size: int = 32) -> np.ndarray:
    """Draws one image.

    Args:
        rng (Generator): Where all randomness comes from.
        name (str): Of :data:`CLASSES`.
        size (int): Width and height in pixels.

    Returns:
        np.ndarray: uint8 (size, size, 3).
    """
    radius = size * rng.uniform(0.25, 0.42)
    centre = rng.uniform(radius, size - radius, 2)
    turned = radius * _any_rotation(rng)
    outlines = [outline @ turned + centre for outline in _outlines(name)]
    bar = size * (_BAR @ _any_rotation(rng) + rng.uniform(0.2, 0.8, 2))
    image = _background(rng, size)
    for cover in (coverage(outlines, size), coverage([bar], size)):
        image += cover[..., None] * (rng.uniform(90, 255, 3) - image)
    image += rng.normal(0, rng.uniform(5, 25), image.shape)
    return image.clip(0, 255).astype(np.uint8)


_BAR = np.array([[1, 0.05], [-1, 0.05], [-1, -0.05], [1, -0.05]])


def _outlines(name: str) -> List[np.ndarray]:
    """Of about unit radius, (points, 2) each; what two of them enclose is outside."""
    if name == 'ring':
        return [_polygon(48), 0.55 * _polygon(48)]
    if name == 'star':
        return [_polygon(10) * np.where(np.arange(10) % 2, 0.45, 1)[:, None]]
    if name == 'cross':
        quarter = np.array([[0.3, 1], [0.3, 0.3], [1, 0.3]])
        turn = np.array([[0, -1], [1, 0]])
        return [np.concatenate([quarter @ np.linalg.matrix_power(turn, i) for i in range(4)])]
    corners = dict(circle=48, triangle=3, square=4, pentagon=5, hexagon=6)
    return [_polygon(corners[name])]


def _polygon(corners: int) -> np.ndarray:
    return on_circle(corners) * [1, -1]


def _any_rotation(rng: Generator) -> np.ndarray:
    return rotation(rng.uniform(0, 2 * np.pi))


def _background(rng: Generator, size: int) -> np.ndarray:
    """Blotches of similar dark colours, float32 (size, size, 3)."""
    blotches = rng.uniform(0, 120, 3) + rng.normal(0, 25, (5, 5, 3))
    return cv2.resize(blotches.astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC)

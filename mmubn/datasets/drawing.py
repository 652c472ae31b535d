"""What the drawn data sets share: outlines, the pixels they cover, and COCO's layout."""

import json
from pathlib import Path
from typing import Iterable, List, Optional, Sequence, Tuple, Union

import cv2
import numpy as np

SETTINGS_FILE = 'scenes.json'  # marks a folder as made here, and says with which arguments
_SUBPIXELS = 4


def on_circle(count: int, jitter: Union[float, np.ndarray] = 0.0) -> np.ndarray:
    """Points on the unit circle, (count, 2), the first at the top."""
    angles = np.arange(count) * 2 * np.pi / count + jitter
    return np.stack([np.sin(angles), -np.cos(angles)], 1)


def rotation(angle: float) -> np.ndarray:
    """Turns points that stand in rows, (points, 2), when these are multiplied by it, (2, 2)."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, sin], [-sin, cos]])


def coverage(outlines: Sequence[np.ndarray], size: int, shift: float = 0.0) -> np.ndarray:
    """Share of each pixel inside of the outlines, float32 (size, size).

    What two outlines enclose is outside. ``shift``, in quarters of a pixel, is to the left and up.
    """
    points = [np.rint(outline * _SUBPIXELS - shift).astype(np.int32) for outline in outlines]
    canvas = np.zeros((size * _SUBPIXELS, size * _SUBPIXELS), np.float32)
    cv2.fillPoly(canvas, points, 1)
    return cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA)


def read_settings(folder: Path) -> Optional[dict]:
    """The settings of which a folder was made here; None of any other folder."""
    try:
        settings = json.loads((folder / SETTINGS_FILE).read_text())
    except (OSError, ValueError):
        return None
    return settings if isinstance(settings, dict) else None


def write_split(
    folder: Path,
    split: str,
    size: int,
    scenes: Iterable[Tuple[int, str, np.ndarray, List[dict]]],
    categories: List[dict],
    **info: dict,
) -> None:
    """Writes ``SPLIT/`` and ``annotations/instances_SPLIT.json``.

    A scene is its id, file name, encoded image and annotations, which get their ids here.
    """
    (folder / split).mkdir()
    images, annotations = [], []
    for image_id, name, image, found in scenes:
        (folder / split / name).write_bytes(image.tobytes())
        images.append(dict(id=image_id, file_name=name, width=size, height=size))
        for annotation in found:
            annotations.append(dict(id=len(annotations) + 1, image_id=image_id, **annotation))
    coco = dict(**info, images=images, annotations=annotations, categories=categories)
    (folder / 'annotations' / f'instances_{split}.json').write_text(json.dumps(coco))

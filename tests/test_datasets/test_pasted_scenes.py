"""Scenes of pasted pictures: boxes that are exact, and the same bytes again."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from mmubn.datasets.pasted_scenes import Pictures, make_pasted_scenes, paste_scene

CLASSES = 'red', 'green'


def pictures(count=6):
    """Plain objects, so that a pixel tells what is pasted there; all else is grey or blue."""
    red, green, blue = (np.full((32, 32, 3), colour, np.uint8) for colour in np.eye(3) * 255)
    grey = np.full((32, 32, 3), 100, np.uint8)
    return Pictures([red, green], [0, 1], [blue, grey], count)


def scenes():
    for seed in range(40):
        yield paste_scene(np.random.default_rng(seed), pictures(), 96)


def test_a_box_is_what_shows_of_its_object():
    for image, boxes, labels in scenes():
        assert image.shape == (96, 96, 3)
        for (left, top, width, height), label in zip(boxes, labels):
            assert left >= 0
            assert top >= 0
            assert max(left + width, top + height) <= 96
            inside = image[top : top + height, left : left + width]
            plain = np.eye(3)[label] * 255
            # Of what lies over it, at most a tenth of the smaller, with up to seven others.
            assert np.all(inside == plain, axis=-1).mean() > 0.5
            assert 18 <= min(width, height) <= max(width, height) <= 79


def test_everything_of_a_class_has_a_box():
    for image, boxes, labels in scenes():
        left = image.copy()
        for x, y, width, height in boxes:
            left[y : y + height, x : x + width] = 0
        for label in range(2):
            assert not np.all(left == np.eye(3)[label] * 255, axis=-1).any()
        assert len(labels) == len(boxes) <= 4


def test_sizes_and_numbers_vary():
    found = [(len(boxes), *(box[2] for box in boxes)) for _, boxes, _ in scenes()]
    assert {entry[0] for entry in found} >= {1, 2, 3, 4}
    widths = [width for entry in found for width in entry[1:]]
    assert min(widths) < 24
    assert max(widths) > 50


def test_files_in_coco_layout(tmp_path):
    splits = dict(train=pictures(3), test=pictures(2))
    assert make_pasted_scenes(tmp_path / 'scenes', splits, CLASSES)
    coco = json.loads((tmp_path / 'scenes/annotations/instances_train.json').read_text())
    assert [c['name'] for c in coco['categories']] == list(CLASSES)
    assert [image['file_name'] for image in coco['images']] == [f'{i:06d}.png' for i in range(3)]
    for annotation in coco['annotations']:
        image = cv2.imread(f'{tmp_path}/scenes/train/{annotation["image_id"] - 1:06d}.png')
        left, top, width, height = annotation['bbox']
        middle = image[top : top + height, left : left + width].reshape(-1, 3)
        plain = np.eye(3)[annotation['category_id'] - 1] * 255
        assert np.all(middle == plain, axis=1).mean() > 0.5
        assert annotation['area'] == width * height
    assert sorted(p.name for p in (tmp_path / 'scenes/test').iterdir()) == [
        '000000.png',
        '000001.png',
    ]


def content(folder: Path) -> dict:
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def test_the_same_again_and_what_is_there_is_left(tmp_path):
    splits = dict(train=pictures(2), val=pictures(2))
    for name in ('a', 'b'):
        assert make_pasted_scenes(tmp_path / name, splits, CLASSES)
    assert content(tmp_path / 'a') == content(tmp_path / 'b')
    train, val = ((tmp_path / 'a' / s / '000000.png').read_bytes() for s in ('train', 'val'))
    assert train != val
    assert not make_pasted_scenes(tmp_path / 'a', splits, CLASSES)
    with pytest.raises(FileExistsError, match='a holds other scenes or none: move it away'):
        make_pasted_scenes(tmp_path / 'a', splits, CLASSES, seed=1)


def test_an_interrupted_one_is_made_anew(tmp_path):
    partial = tmp_path / 'scenes.partial' / 'train'
    partial.mkdir(parents=True)
    (partial / 'stale.png').write_bytes(b'x')
    assert make_pasted_scenes(tmp_path / 'scenes', dict(train=pictures(1)), CLASSES)
    assert [p.name for p in (tmp_path / 'scenes' / 'train').iterdir()] == ['000000.png']
    assert not partial.exists()

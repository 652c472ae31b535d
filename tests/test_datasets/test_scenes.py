"""The generator of synthetic scenes: bytes, annotations, and whose folder it writes."""

import json

import cv2
import numpy as np
import pytest
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO

from mmubn.datasets import scenes
from mmubn.datasets.scenes import CLASSES, make_scenes

COUNTS = dict(num_train=12, num_val=6)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    out_dir = tmp_path_factory.mktemp('scenes')
    assert make_scenes(out_dir, **COUNTS, seed=3)
    return out_dir


@pytest.fixture(scope='module', params=['train', 'val'])
def coco(request, folder):
    return COCO(str(folder / 'annotations' / f'instances_{request.param}.json'))


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob('*')
        if path.is_file()
    }


def test_same_seed_same_bytes(folder, tmp_path):
    make_scenes(tmp_path, **COUNTS, seed=3)
    first = contents(folder)
    assert contents(tmp_path) == first
    assert len(first) == COUNTS['num_train'] + COUNTS['num_val'] + 3


def test_other_seed_other_images(folder, tmp_path):
    make_scenes(tmp_path, **COUNTS, seed=4)
    first, second = contents(folder), contents(tmp_path)
    images = [name for name in first if name.endswith('.jpg')]
    assert all(first[name] != second[name] for name in images)


def test_train_and_val_share_no_image_and_no_id(folder):
    files = {split: contents(folder / split) for split in ('train', 'val')}
    assert set(files['train'].values()).isdisjoint(files['val'].values())
    assert set(files['train']).isdisjoint(files['val'])


def test_a_larger_set_begins_with_the_smaller(folder, tmp_path):
    make_scenes(tmp_path, num_train=14, num_val=1, seed=3)
    smaller, larger = contents(folder / 'train'), contents(tmp_path / 'train')
    assert smaller.items() < larger.items()


def test_images_are_what_the_annotations_say(folder, coco):
    split = 'train' if len(coco.imgs) == COUNTS['num_train'] else 'val'
    assert {entry['file_name'] for entry in coco.imgs.values()} == set(contents(folder / split))
    for entry in coco.imgs.values():
        image = cv2.imread(str(folder / split / entry['file_name']))
        assert image.shape == (entry['height'], entry['width'], 3) == (128, 128, 3)
        assert image.std() > 5


def test_polygons_rasterise_to_area_and_box(coco):
    for annotation in coco.anns.values():
        mask = coco.annToMask(annotation).astype(bool)
        polygons = [np.reshape(part, (-1, 2)) for part in annotation['segmentation']]
        by_shoelace = sum(cv2.contourArea(part.astype(np.float32)) for part in polygons)
        assert mask.sum() == annotation['area'] == by_shoelace
        assert mask.sum() >= 24
        ys, xs = np.nonzero(mask)
        left, top, width, height = annotation['bbox']
        assert (xs.min(), ys.min()) == (left, top)
        assert (xs.max() + 1, ys.max() + 1) == (left + width, top + height)
        assert annotation['iscrowd'] == 0


def test_masks_of_an_image_are_disjoint(coco):
    for annotations in coco.imgToAnns.values():
        assert sum(coco.annToMask(annotation).astype(int) for annotation in annotations).max() == 1


def test_every_class_is_there(coco):
    assert [coco.cats[key]['name'] for key in sorted(coco.cats)] == list(CLASSES)
    assert {annotation['category_id'] for annotation in coco.anns.values()} == set(coco.cats)
    assert set(coco.imgToAnns) == set(coco.imgs)


def test_mask_pixels_show_the_drawn_object():
    """The image inside a mask is another one than without the object."""
    rng = np.random.default_rng(0)
    for _ in range(5):
        image, instances = scenes.draw_scene(rng)
        for instance in instances:
            rim = cv2.dilate(instance.mask.astype(np.uint8), np.ones((7, 7))).astype(bool)
            inside = np.median(image[instance.mask], axis=0)
            outside = np.median(image[rim & ~instance.mask], axis=0)
            assert np.abs(inside - outside).max() > 10


@pytest.mark.parametrize('size', [64, 96])
def test_size(tmp_path, size):
    make_scenes(tmp_path, num_train=2, num_val=1, size=size)
    coco = COCO(str(tmp_path / 'annotations' / 'instances_train.json'))
    for entry in coco.imgs.values():
        assert cv2.imread(str(tmp_path / 'train' / entry['file_name'])).shape == (size, size, 3)
    widest = max(annotation['bbox'][2] for annotation in coco.anns.values())
    assert widest <= 64 / 128 * size + 2


@pytest.mark.parametrize('density', [0.1, 0.5, 0.9])
def test_mask_to_polygons_is_exact_on_noise(density):
    """Holes, holes in islands in holes, and pixels that touch at a corner."""
    mask = np.random.default_rng(0).random((40, 31)) < density
    polygons = scenes.mask_to_polygons(mask)
    rles = mask_utils.frPyObjects(polygons, *mask.shape)
    np.testing.assert_array_equal(mask_utils.decode(mask_utils.merge(rles)).astype(bool), mask)
    assert mask_utils.area(rles).sum() == mask.sum()  # disjoint


def test_second_call_writes_nothing(folder):
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob('*')}
    assert not make_scenes(folder, **COUNTS, seed=3)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob('*')} == stamps


def test_other_settings_replace_all_of_the_folder(tmp_path):
    make_scenes(tmp_path / 'changed', num_train=3, num_val=1)
    for name in ('changed', 'new'):
        assert make_scenes(tmp_path / name, num_train=2, num_val=1)
    assert contents(tmp_path / 'changed') == contents(tmp_path / 'new')


def test_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / 'train').mkdir()
    (tmp_path / 'train' / 'mine.jpg').write_bytes(b'photo')
    with pytest.raises(FileExistsError, match='was not made here'):
        make_scenes(tmp_path, num_train=1, num_val=1)
    assert contents(tmp_path) == {'train/mine.jpg': b'photo'}


@pytest.mark.parametrize('settings', ['{"description": "mine"}', '[1]', 'no JSON'])
def test_a_foreign_file_of_the_same_name(tmp_path, settings):
    (tmp_path / 'train').mkdir()
    (tmp_path / 'train' / 'mine.jpg').write_bytes(b'photo')
    (tmp_path / 'scenes.json').write_text(settings)
    with pytest.raises(FileExistsError, match='was not made here'):
        make_scenes(tmp_path, num_train=1, num_val=1)
    assert set(contents(tmp_path)) == {'train/mine.jpg', 'scenes.json'}


def test_file_in_the_way(tmp_path):
    (tmp_path / 'scenes').write_text('a file')
    with pytest.raises(FileExistsError, match='scenes'):
        make_scenes(tmp_path / 'scenes', num_train=1, num_val=1)


@pytest.mark.parametrize('last_image', [1, 3])
def test_interrupted_generation_is_not_taken_for_finished(tmp_path, monkeypatch, last_image):
    """Killed while drawing train or val: no annotations of val, and the next call starts anew."""
    draw, drawn = scenes.draw_scene, []

    def interrupted(rng, size):
        if len(drawn) == last_image:
            raise KeyboardInterrupt
        drawn.append(size)
        return draw(rng, size)

    monkeypatch.setattr(scenes, 'draw_scene', interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_scenes(tmp_path / 'scenes', num_train=2, num_val=2)
    monkeypatch.undo()
    assert not (tmp_path / 'scenes' / 'annotations' / 'instances_val.json').exists()
    assert not json.loads((tmp_path / 'scenes' / 'scenes.json').read_text())['finished']

    assert make_scenes(tmp_path / 'scenes', num_train=2, num_val=2)
    make_scenes(tmp_path / 'uninterrupted', num_train=2, num_val=2)
    assert contents(tmp_path / 'scenes') == contents(tmp_path / 'uninterrupted')


@pytest.mark.parametrize(
    'wrong', [dict(num_train=0), dict(num_val=-1), dict(size=16), dict(seed=-1)]
)
def test_bad_argument_is_named(tmp_path, wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f'{name} must be at least'):
        make_scenes(tmp_path / 'scenes', **wrong)
    assert not (tmp_path / 'scenes').exists()

"""The drawn shapes: what they depend on and what is drawn."""

import numpy as np
import pytest
from mmengine.registry import DATASETS

pytest.importorskip('mmpretrain')

from mmubn.datasets import shapes
from mmubn.datasets.drawing import coverage


def build(split='train', count=16, **settings):
    return DATASETS.build(dict(type='Shapes', split=split, count=count, **settings))


def images(dataset) -> np.ndarray:
    return np.stack([sample['img'] for sample in dataset])


def test_an_image_depends_on_split_seed_and_number():
    train = images(build())
    assert train.shape == (16, 32, 32, 3)
    assert train.dtype == np.uint8
    assert np.array_equal(images(build(count=8)), train[:8])
    for other in (build('test'), build(seed=1)):
        assert not (images(other) == train).all((1, 2, 3)).any()


def test_classes_take_turns():
    dataset = build()
    assert dataset.metainfo['classes'] == shapes.CLASSES
    assert [sample['gt_label'] for sample in dataset] == [*range(8), *range(8)]


@pytest.mark.parametrize(
    ('name', 'area'),
    [
        ('circle', np.pi),
        ('triangle', 1.299),
        ('square', 2),
        ('pentagon', 2.378),
        ('hexagon', 2.598),
        ('star', 1.323),
        ('cross', 2.04),
        ('ring', np.pi * (1 - 0.55**2)),
    ],
)
def test_outlines_enclose_their_area(name, area):
    outlines = [30 * outline + 32 for outline in shapes._outlines(name)]
    assert coverage(outlines, 64).sum() / 30**2 == pytest.approx(area, rel=0.05)


def test_the_shape_is_in_the_image():
    """Its colour stands out against the background, inside of the image."""
    image = shapes.draw_shape(np.random.default_rng(3), 'circle', 64).astype(float)
    flat = shapes.draw_shape(np.random.default_rng(3), 'triangle', 64).astype(float)
    differs = np.abs(image - flat).max(2) > 100
    assert 0.005 < differs.mean() < 0.4


@pytest.mark.parametrize(
    ('settings', 'message'), [({'split': 'val'}, 'split'), ({'count': 0}, 'count')]
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        build(**settings)

"""Class folders in memory: the pixels, the labels, the order, the limits."""

import tracemalloc
import zipfile

import cv2
import numpy as np
import pytest
from mmengine.registry import DATASETS

pytest.importorskip('mmpretrain')

import mmubn.datasets  # noqa: F401  registers them

CLASSES = ('apple', 'bear', 'cat')


@pytest.fixture
def pixels(tmp_path):
    """Writes four images of each class, in turn as PNG and as lossless WebP."""
    rng = np.random.default_rng(0)
    written = {}
    for name in CLASSES:
        (tmp_path / 'train' / name).mkdir(parents=True)
        for number in range(4):
            image = rng.integers(0, 256, (8, 8, 3), np.uint8)
            suffix, options = (
                ('.webp', [cv2.IMWRITE_WEBP_QUALITY, 101]) if number % 2 else ('.png', [])
            )
            path = str(tmp_path / 'train' / name / f'{number}{suffix}')
            cv2.imwrite(path, image[..., ::-1], options)
            written[path] = image
    return written


def build(root, **settings):
    kind = dict(type='CachedImageFolder', data_root=str(root), data_prefix='train')
    return DATASETS.build({**kind, **settings})


@pytest.mark.parametrize('serialize_data', [True, False])
def test_pixels_and_labels(pixels, tmp_path, serialize_data):
    dataset = build(tmp_path, serialize_data=serialize_data)
    assert dataset.metainfo['classes'] == CLASSES
    samples = [dataset[i] for i in range(len(dataset))]
    assert {sample['img_path'] for sample in samples} == pixels.keys()
    for sample in samples:
        assert np.array_equal(sample['img'], pixels[sample['img_path']])
        assert f'/{CLASSES[sample["gt_label"]]}/' in sample['img_path']


def test_first_samples_are_of_all_classes(pixels, tmp_path):
    paths = [sample['img_path'] for sample in build(tmp_path)]
    first = build(tmp_path, indices=6)
    assert [sample['img_path'] for sample in first] == paths[:6]
    assert {sample['gt_label'] for sample in first} == {0, 1, 2}


def test_only_what_is_used_is_decoded(pixels, tmp_path):
    broken = [sample['img_path'] for sample in build(tmp_path)][-1]
    with open(broken, 'wb') as file:
        file.write(b'no image')
    assert len(build(tmp_path, indices=11)) == 11
    with pytest.raises(ValueError, match=f'{broken} is not a whole image'):
        build(tmp_path)


def test_too_large_for_memory(pixels, tmp_path):
    size = 12 * 8 * 8 * 3 / 2**30
    assert len(build(tmp_path, max_gib=size)) == 12
    with pytest.raises(MemoryError, match=r"raise max_gib, or use type='CustomDataset'"):
        build(tmp_path, max_gib=size * 0.99)


@pytest.mark.parametrize('serialize_data', [True, False])
def test_memory_while_it_starts(tmp_path, serialize_data):
    folder = tmp_path / 'train' / 'apple'
    folder.mkdir(parents=True)
    for number in range(50):
        cv2.imwrite(f'{folder}/{number}.png', np.full((200, 200, 3), number, np.uint8))
    build(tmp_path, indices=1)  # what is imported then does not count
    tracemalloc.start()
    try:
        dataset = build(tmp_path, serialize_data=serialize_data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    images = 50 * 200 * 200 * 3
    assert images < peak < 1.2 * images
    assert sorted(sample['img'].max() for sample in dataset) == list(range(50))


@pytest.mark.parametrize('serialize_data', [True, False])
def test_a_folder_that_could_not_be_decoded_is_read_again(pixels, tmp_path, serialize_data):
    path = next(iter(pixels))
    with open(path, 'rb') as file:
        whole = file.read()
    with open(path, 'wb') as file:
        file.write(b'no image')
    dataset = build(tmp_path, lazy_init=True, serialize_data=serialize_data)
    with pytest.raises(ValueError, match='is not a whole image'):
        dataset.full_init()
    with open(path, 'wb') as file:
        file.write(whole)
    assert {sample['img_path'] for sample in dataset} == pixels.keys()
    assert all('img' in sample for sample in dataset)


@pytest.mark.parametrize('suffix', ['.tiff', '.jfif', '.TIFF'])
def test_other_names_of_tiff_and_jpeg(tmp_path, suffix):
    written = np.full((8, 8, 3), (200, 100, 50), np.uint8)
    encoded = cv2.imencode('.jpg' if suffix == '.jfif' else '.tif', written[..., ::-1])[1]
    path = tmp_path / 'train' / 'apple' / f'0{suffix}'
    path.parent.mkdir(parents=True)
    path.write_bytes(encoded.tobytes())
    (sample,) = build(tmp_path)
    assert np.abs(sample['img'].astype(int) - written).max() <= 2


@pytest.mark.slow
def test_cifar100_in_class_folders(real_data, tmp_path):
    """The folders' order is that of CIFAR-100's labels; mean and deviation are mmpretrain's."""
    from mmpretrain.datasets.categories import CIFAR100_CATEGORIES

    file = real_data / 'cifar100_test.zip'
    if not file.is_file():
        pytest.skip(f'no {file}')
    with zipfile.ZipFile(file) as archive:
        archive.extractall(tmp_path)
    dataset = build(tmp_path / 'cifar100', data_prefix='test')
    assert dataset.metainfo['classes'] == tuple(CIFAR100_CATEGORIES)
    assert np.bincount(dataset.get_gt_labels()).tolist() == [100] * 100
    images = np.stack([dataset.get_data_info(i)['img'] for i in range(len(dataset))])
    assert images.mean((0, 1, 2)) == pytest.approx([129.304, 124.070, 112.434], abs=1)
    assert images.std((0, 1, 2)) == pytest.approx([68.170, 65.392, 70.418], abs=1)

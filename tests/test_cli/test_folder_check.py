"""Class folders and lists of labels that are read otherwise than meant."""

import errno
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from mmengine.dataset import DefaultSampler
from mmengine.registry import DATASETS, MODELS
from told import told
from torch import nn
from torch.utils.data import DataLoader

pytest.importorskip('mmpretrain')

from mmubn.cli.class_check import check_classes
from mmubn.cli.data_check import check_data
from mmubn.cli.model import build_model

SCOPE = 'mmpretrain'
NAMES = ('apple', 'bear', 'cat')
TYPES = ('CachedImageFolder', 'CustomDataset')


@pytest.fixture(params=TYPES)
def cfg(request) -> Config:
    for split in ('train', 'val'):
        for name in NAMES:
            Path(split, name).mkdir(parents=True)
            cv2.imwrite(f'{split}/{name}/0.png', np.zeros((8, 8, 3), np.uint8))

    def loader(split):
        return dict(dataset=dict(type=request.param, data_root='.', data_prefix=split))

    evaluator = dict(type='Accuracy', topk=(1,))
    return Config(
        dict(
            model=dict(head=dict(type='LinearClsHead', num_classes=3, in_channels=8)),
            train_dataloader=loader('train'),
            val_dataloader=loader('val'),
            test_dataloader=loader('val'),
            val_evaluator=evaluator,
            test_evaluator=evaluator,
        )
    )


def check(cfg: Config, *splits: str) -> None:
    splits = splits or ('train', 'val')
    found = check_data(cfg, splits)
    model = nn.ModuleDict(dict(head=MODELS.build(cfg.model.head)))
    check_classes(cfg, model, found)


def failure(cfg: Config, *splits: str) -> str:
    return told(check, cfg, *splits)


def test_sound_folders(cfg):
    check(cfg)
    check(cfg, 'test')


@pytest.mark.parametrize(
    ('change', 'reason'),
    [
        (lambda: shutil.rmtree('val/apple'), "val lacks 'apple'; every split"),
        (lambda: Path('val/aardvark').mkdir(), "val also has 'aardvark'; every split"),
        (
            lambda: Path('val/apple').rename('val/Apple'),
            "val lacks 'apple' and also has 'Apple', did you mean 'apple'?",
        ),
        (lambda: shutil.rmtree('train/cat'), "val also has 'cat'"),
    ],
)
def test_splits_that_differ(cfg, change, reason):
    change()
    line = failure(cfg)
    start = 'val_dataloader.dataset: the class folders are not those of train_dataloader.dataset'
    assert line.startswith(start)
    assert reason in line
    line = failure(cfg, 'test')  # the training images are at hand
    assert line.startswith(start.replace('val_', 'test_'))


def test_a_test_without_the_training_images(cfg):
    shutil.rmtree('train')
    check(cfg, 'test')
    shutil.rmtree('val/apple')
    assert failure(cfg, 'test') == (
        'model.head.num_classes=3, and there are 2 class folders in ./val; give --cfg-options '
        'model.head.num_classes=2'
    )


def test_joined_datasets_that_differ(cfg):
    shutil.copytree('train', 'more')
    inner = cfg.train_dataloader.dataset
    datasets = [inner, {**inner, 'data_prefix': 'more'}]
    cfg.train_dataloader.dataset = dict(type='ConcatDataset', datasets=datasets)
    check(cfg)
    Path('more/dog').mkdir()
    assert failure(cfg).startswith('train_dataloader.dataset.datasets.1: the class folders are not')


@pytest.mark.parametrize(
    'name',
    ['.ipynb_checkpoints', '__MACOSX', '@eaDir', '__pycache__', '$RECYCLE.BIN', 'lost+found'],
)
def test_foreign_folders_are_no_classes(cfg, name):
    for split in ('train', 'val'):
        shutil.copytree(f'{split}/cat', f'{split}/{name}')
    if cfg.train_dataloader.dataset.type == 'CustomDataset':
        assert failure(cfg) == (
            f'train_dataloader.dataset: CustomDataset takes the folder ./train/{name} for a class, '
            'and numbers all later classes wrongly; delete it'
        )
        return
    check(cfg)
    dataset = DATASETS.build({**cfg.train_dataloader.dataset, 'pipeline': []})
    assert dataset.metainfo['classes'] == NAMES
    assert sorted(dataset.get_gt_labels()) == [0, 1, 2]


def test_foreign_folders_that_would_be_read(cfg):
    shutil.copytree('val/cat', 'val/cat/deep/.ipynb_checkpoints')
    if cfg.train_dataloader.dataset.type == 'CachedImageFolder':
        check(cfg)
        return
    assert failure(cfg) == (
        'val_dataloader.dataset: CustomDataset reads ./val/cat/deep/.ipynb_checkpoints/0.png as an '
        "image of 'cat'; delete the folder ./val/cat/deep/.ipynb_checkpoints"
    )
    Path('val/cat/deep/.ipynb_checkpoints/0.png').rename('val/cat/deep/.ipynb_checkpoints/0.txt')
    check(cfg)


def test_foreign_folders_inside_of_a_class():
    for folder in ('train/a', 'train/a/.ipynb_checkpoints', 'train/a/deep'):
        Path(folder).mkdir(parents=True)
        cv2.imwrite(f'{folder}/0.png', np.zeros((8, 8, 3), np.uint8))
    dataset = DATASETS.build(dict(type='CachedImageFolder', data_root='.', data_prefix='train'))
    paths = {dataset.get_data_info(index)['img_path'] for index in range(len(dataset))}
    assert paths == {'./train/a/0.png', './train/a/deep/0.png'}


def test_no_folders(cfg):
    for name in NAMES:
        shutil.rmtree(f'train/{name}')
    assert failure(cfg) == (
        'train_dataloader.dataset: no class folders in ./train; it must hold one for each class'
    )


def test_files_that_are_no_images(cfg):
    Path('train/bear/0.png').rename('train/bear/0.gif')
    line = failure(cfg)
    assert line.startswith(
        'train_dataloader.dataset: no file in ./train/bear is read, such as ./train/bear/0.gif; '
        'the suffixes that are read are .bmp, .j'
    )
    Path('train/bear/0.gif').unlink()
    check(cfg)
    for name in ('apple', 'cat'):
        Path(f'train/{name}/0.png').unlink()
    assert failure(cfg).startswith('train_dataloader.dataset: no image in any of the class folders')


def test_files_beside_images_are_told(cfg, capsys):
    for number, suffix in enumerate(('heic', 'heic', 'gif')):
        Path(f'train/bear/x{number}.{suffix}').touch()
    Path('train/bear/.hidden').touch()
    check(cfg)
    (line,) = capsys.readouterr().err.splitlines()
    start, found = line.split(', such as ')
    assert start == (
        'warning: train_dataloader.dataset: 3 files in the class folders of ./train are not read'
    )
    assert found.startswith('./train/bear/x')
    assert found.endswith(': set train_dataloader.dataset.extensions where others are images')


def test_skipped_folders_with_images_are_told(cfg, capsys):
    for name in ('__unknown__', '@home', '.git'):
        Path('train', name, 'deep').mkdir(parents=True)
    Path('train/.git/config').touch()
    if cfg.train_dataloader.dataset.type == 'CustomDataset':
        assert 'delete it' in failure(cfg)
        return
    check(cfg)
    assert capsys.readouterr().err == ''
    shutil.copy('train/cat/0.png', 'train/__unknown__/0.png')
    shutil.copy('train/cat/0.png', 'train/@home/deep/0.png')
    check(cfg)
    assert capsys.readouterr().err == (
        "warning: train_dataloader.dataset: the folders '@home', '__unknown__' in ./train hold "
        'images and are no classes, since programs make folders with such names; rename a folder '
        'that is a class\n'
    )


def test_an_image_without_bytes(cfg):
    Path('val/cat/0.png').write_bytes(b'')
    assert failure(cfg) == (
        'val_dataloader.dataset: ./val/cat/0.png is empty; copy it anew, or delete it'
    )


def test_a_link_that_leads_to_no_file(cfg):
    Path('store').mkdir()
    Path('val/cat/0.png').rename('store/0.png')
    Path('val/cat/0.png').symlink_to(Path('store/0.png').absolute())
    check(cfg)
    Path('store').rename('moved')
    assert failure(cfg).startswith(
        'val_dataloader.dataset: ./val/cat/0.png is no file that can be read, such as a link to '
    )


def batches(loader: dict) -> int:
    dataset = DATASETS.build({**loader['dataset'], 'pipeline': []})
    sampler = DefaultSampler(dataset)
    return len(DataLoader(dataset, loader['batch_size'], sampler=sampler, drop_last=True))


@pytest.mark.parametrize('listed', [False, True])
@pytest.mark.parametrize(
    ('size', 'indices', 'images'),
    [(3, None, None), (4, None, 3), (2, 2, None), (2, -1, 1), (2, [1], 1), (4, 9, 3)],
)
def test_a_batch_that_is_larger_than_the_data(cfg, listed, size, indices, images):
    loader = cfg.train_dataloader
    loader.update(batch_size=size, drop_last=True, sampler=dict(type='DefaultSampler'))
    loader.dataset.indices = indices
    if listed:
        lines = [f'{name}/0.png {label}' for label, name in enumerate(NAMES)]
        Path('list.txt').write_text('\n'.join(lines))
        loader.dataset.ann_file = 'list.txt'
    assert batches(loader) == (images is None)
    if images is None:
        check(cfg)
        return
    assert failure(cfg) == (
        f'train_dataloader.drop_last=True: {images} images for each process are no whole batch of '
        f'{size}, so that none is read; give --cfg-options train_dataloader.drop_last=False, or '
        f'train_dataloader.batch_size={images}'
    )
    loader.drop_last = False
    check(cfg)
    loader.drop_last, loader.sampler.type = True, 'RepeatAugSampler'
    check(cfg)


def length(dataset: dict) -> int:
    return len(DATASETS.build({**dataset, 'pipeline': []}))


@pytest.mark.parametrize(
    ('links', 'found'),
    [
        ({'val/cat/back': '.'}, 'val/cat/back'),
        ({'val/cat/back': '..'}, 'val/cat/back'),
        ({'val/cat/back': 'back'}, 'val/cat/back'),
        ({'val/cat/one': '../../store', 'store/back': '../val/cat'}, 'val/cat/one/back'),
        ({'val/back': '.'}, 'val/back/back'),
        ({'val/back': 'back'}, 'val/back'),
    ],
)
def test_a_link_that_leads_back(cfg, links, found):
    Path('store').mkdir()
    for link, target in links.items():
        Path(link).symlink_to(target)
    with pytest.raises(OSError, match='Too many levels of symbolic links'):
        length(cfg.val_dataloader.dataset)
    assert failure(cfg) == (
        f'val_dataloader.dataset: ./{found} is a link that leads back to itself or to a folder '
        'that it lies in; delete it'
    )


def test_links_that_lead_elsewhere(cfg):
    Path('store').mkdir()
    cv2.imwrite('store/0.png', np.zeros((8, 8, 3), np.uint8))
    for link in ('val/apple/one', 'val/cat/one', 'val/cat/two'):
        Path(link).symlink_to('../../store')
    Path('val/cat/nothing').symlink_to('../absent')
    for split in ('train', 'val'):
        Path(split, 'dog').symlink_to('bear')
    cfg.model.head.num_classes = 4
    check(cfg)
    assert length(cfg.val_dataloader.dataset) == 4 + 3


def test_links_that_lead_back_in_skipped_folders(cfg):
    Path('val/cat/.back').symlink_to('.')
    if cfg.val_dataloader.dataset.type == 'CustomDataset':  # it reads them
        assert 'val/cat/.back is a link that leads back' in failure(cfg)
        return
    Path('val/__other__').mkdir()
    Path('val/__other__/back').symlink_to('.')
    check(cfg)
    assert length(cfg.val_dataloader.dataset) == 3


def test_a_folder_that_cannot_be_opened(cfg, monkeypatch):
    walk = os.scandir

    def scandir(place):
        if str(place).endswith('val/cat'):
            raise PermissionError(errno.EACCES, 'Permission denied', place)  # root may open all
        return walk(place)

    monkeypatch.setattr(os, 'scandir', scandir)
    with pytest.raises(PermissionError):
        length(cfg.val_dataloader.dataset)
    assert failure(cfg) == (
        'val_dataloader.dataset: ./val/cat cannot be opened (Permission denied); let it be read, '
        'or remove it'
    )


def test_no_folder_of_a_split(cfg):
    cfg.val_dataloader.dataset = dict(type='ImageNet', data_root='train', split='val')
    line = 'val_dataloader.dataset: no folder train/val; it must hold a folder for each class'
    assert failure(cfg) == line


def test_unpacked_into_a_folder_too_many(cfg):
    for split in ('train', 'val'):
        Path(split).rename('images')
        Path(split).mkdir()
        Path('images').rename(f'{split}/images')
    assert 'model.head.num_classes=3, and there are 1 class folders in ./train' in failure(cfg)


@pytest.mark.parametrize('number', [1, 2, 4, 1000])
def test_num_classes_of_the_head(cfg, number):
    cfg.model.head.num_classes = number
    assert failure(cfg) == (
        f'model.head.num_classes={number}, and there are 3 class folders in ./train; give '
        '--cfg-options model.head.num_classes=3'
    )


def test_num_classes_of_labels_that_are_mixed(cfg):
    cfg.model.type = 'ImageClassifier'
    cfg.model.backbone = dict(type='LeNet5')
    cfg.model.train_cfg = dict(augments=dict(type='Mixup', alpha=0.8))
    cfg.data_preprocessor = dict(num_classes=1000)
    found = check_data(cfg, ('train',))
    assert told(check_classes, cfg, build_model(cfg), found) == (
        'data_preprocessor.num_classes=1000, and there are 3 class folders in ./train; give '
        '--cfg-options data_preprocessor.num_classes=3'
    )
    cfg.data_preprocessor.num_classes = 3
    check_classes(cfg, build_model(cfg), check_data(cfg, ('train',)))


def test_what_a_dataset_refuses(cfg):
    cfg.train_dataloader.dataset = dict(type='ImageNet', data_root='.', split='trian')
    assert failure(cfg).startswith('train_dataloader.dataset: ImageNet: The split must be one of')


def test_what_the_evaluator_asks_for(cfg):
    cfg.val_evaluator.topk = (1, 5)
    line = failure(cfg)
    assert line.startswith(
        'val_evaluator.topk=(1, 5), and there are 3 class folders in ./val; give'
    )


@pytest.mark.parametrize(
    ('classes', 'reason'),
    [
        (['bear', 'apple', 'cat'], "metainfo.classes: 'bear' is class 0 here, and its folder"),
        (['apple', 'bear'], "class folders, 'apple', 'bear', 'cat', and the config names 2 cl"),
        ('apple', 'is a string, and no file of names'),
    ],
)  # fmt: skip
def test_classes_that_do_not_fit_the_folders(cfg, classes, reason):
    cfg.train_dataloader.dataset.metainfo = dict(classes=classes)
    assert reason in failure(cfg)
    cfg.train_dataloader.dataset.metainfo = None
    cfg.train_dataloader.dataset.classes = classes
    assert reason in failure(cfg)


def test_classes_of_other_words_are_theirs(cfg):
    # As ImageNet's, whose folders have codes for names.
    cfg.train_dataloader.dataset.metainfo = dict(classes=['Apfel', 'Baer', 'Katze'])
    check(cfg)


def test_imagenet_of_fewer_classes(cfg):
    cfg.train_dataloader.dataset = dict(type='ImageNet', data_root='.', split='train')
    line = failure(cfg)
    assert "./train has 3 class folders, 'apple', 'bear', 'cat', and the config names 1000" in line
    cfg.train_dataloader.dataset.metainfo = dict(classes=NAMES)
    check(cfg)


@pytest.mark.parametrize(
    ('lines', 'reason'),
    [
        ('', 'is empty'),
        ('apple/0.png\n', "line 1 of ./list.txt is 'apple/0.png', not FILE LABEL"),
        ('apple/0.png 0\nbear/0.png one\n', "line 2 of ./list.txt is 'bear/0.png one', not FILE"),
        ('apple/0.png 0\n\n', "line 2 of ./list.txt is '', not FILE LABEL"),
        ('apple/0.png 0\nbear/1.png 1\n', './train has no bear/1.png; 1 of 2 images of ./list.txt'),
        ('apple/0.png 1\nbear/0.png 2\ncat/0.png 3\n', "'apple' is class 0 by ./val, and class 1"),
    ],
)  # fmt: skip
def test_lists_of_labels(cfg, lines, reason):
    Path('list.txt').write_text(lines)
    cfg.train_dataloader.dataset.ann_file = 'list.txt'
    assert reason in failure(cfg)


def test_text_that_is_not_utf8(cfg):
    Path('list.txt').write_text('apple/0.png 0\n', encoding='utf-16')
    cfg.train_dataloader.dataset.ann_file = 'list.txt'
    line = 'train_dataloader.dataset.ann_file: ./list.txt is no UTF-8 ('
    assert failure(cfg).startswith(line)
    Path('names.txt').write_text('Bär\n', encoding='latin-1')
    cfg.train_dataloader.dataset.metainfo = dict(classes='names.txt')
    line = 'train_dataloader.dataset.metainfo.classes: names.txt is no UTF-8 ('
    assert failure(cfg).startswith(line)


def test_the_folder_of_the_images(cfg):
    cfg.train_dataloader.dataset.data_prefix = dict(img_path='train')
    check(cfg)
    cfg.train_dataloader.dataset.data_prefix = dict(img='train')  # as for mmdet
    assert failure(cfg) == (
        'train_dataloader.dataset.data_prefix: must name the folder of the images, as text or by '
        "dict(img_path=...), got {'img': 'train'}"
    )


def test_lists_that_begin_at_one(cfg):
    Path('list.txt').write_text('apple/0.png 1\nbear/0.png 2\ncat/0.png 3\n')
    cfg.train_dataloader.dataset.ann_file = cfg.val_dataloader.dataset.ann_file = 'list.txt'
    assert 'model.head.num_classes=3, and there are at least 4 labels in ./list.txt' in failure(cfg)


def test_sound_list_of_labels(cfg):
    Path('list.txt').write_text('apple/0.png 0\nbear/0.png 1\n')
    cfg.train_dataloader.dataset.ann_file = 'list.txt'
    check(cfg)
    cfg.train_dataloader.dataset.metainfo = dict(classes=('apple',))
    assert 'labels bear/0.png 1, and metainfo has 1 classes, 0 to 0' in failure(cfg)


def test_lists_that_number_the_folders_otherwise(cfg):
    right = ''.join(f'{name}/0.png {label}\n' for label, name in enumerate(NAMES))
    wrong = 'apple/0.png 1\nbear/0.png 0\ncat/0.png 2\n'
    val = cfg.val_dataloader.dataset
    val.ann_file = 'val.txt'
    Path('val.txt').write_text(right)
    check(cfg)
    Path('val.txt').write_text(wrong)
    assert failure(cfg).startswith(
        "val_dataloader.dataset: 'apple' is class 1 by ./val.txt, and class 0 by ./train; number "
    )
    cfg.train_dataloader.dataset.ann_file = 'train.txt'
    Path('train.txt').write_text(wrong)
    check(cfg)
    Path('train.txt').write_text(right)
    assert "'apple' is class 1 by ./val.txt, and class 0 by ./train.txt; number" in failure(cfg)
    # Folders that hold several classes say nothing.
    for split in ('train', 'val'):
        for name in NAMES:
            Path(split, name, '0.png').rename(Path(split, f'{name}.png'))
        numbers = range(3) if split == 'train' else (1, 0, 2)
        lines = [f'{name}.png {label}' for name, label in zip(NAMES, numbers)]
        Path(f'{split}.txt').write_text('\n'.join(lines))
    check(cfg)

"""--data-root and --eval-on-train on resolved configs."""

import pytest
from mmengine.config import Config
from told import told
from tool import CONFIGS

from mmubn.cli.data_root import evaluate_on_train, set_data_root
from mmubn.cli.errors import CommandError


def coco() -> Config:
    pytest.importorskip('mmdet')
    return Config.fromfile(CONFIGS / 'mask_rcnn_r50_ubn_1x_coco.py')


def from_base(base: str) -> Config:
    pytest.importorskip(base.split('::')[0])
    return Config.fromstring(f"_base_ = '{base}'", '.py')


def test_coco_config(tmp_path):
    cfg, root = coco(), str(tmp_path)
    before = cfg.to_dict()
    set_data_root(cfg, root)
    for split, name in (('train', 'train2017'), ('val', 'val2017'), ('test', 'val2017')):
        dataset = cfg[f'{split}_dataloader'].dataset
        assert dataset.data_root == root
        assert dataset.ann_file == f'annotations/instances_{name}.json'
        assert dataset.data_prefix.img == f'{name}/'
    for split in ('val', 'test'):
        file = f'{root}/annotations/instances_val2017.json'
        assert cfg[f'{split}_evaluator'].ann_file == file
    after = cfg.to_dict()
    for key in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        before[key]['dataset']['data_root'] = after[key]['dataset']['data_root']
    for key in ('val_evaluator', 'test_evaluator'):
        before[key]['ann_file'] = after[key]['ann_file']
    assert after == before


def test_folder_inside_of_the_old_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'data/coco/mine').mkdir(parents=True)
    cfg = coco()
    set_data_root(cfg, 'data/coco/mine')
    file = 'data/coco/mine/annotations/instances_val2017.json'
    assert cfg.val_evaluator.ann_file == cfg.test_evaluator.ann_file == file


def test_nested_datasets_and_lists_of_evaluators(tmp_path):
    root = str(tmp_path)
    inner = dict(type='CocoDataset', data_root='data/a/', ann_file='data/a/ann.json')
    other = dict(type='CocoDataset', data_root='data/a', data_prefix=dict(img='data/a/img/'))
    joined = dict(type='ConcatDataset', datasets=[inner, other])
    cfg = Config(
        dict(
            train_dataloader=dict(dataset=dict(type='RepeatDataset', times=2, dataset=joined)),
            val_evaluator=[dict(type='A', ann_file='data/a/x.json'), dict(type='data/ab/y')],
            work_dir='data/a/run',
        )
    )
    set_data_root(cfg, root)
    inner, other = cfg.train_dataloader.dataset.dataset.datasets
    assert inner == dict(type='CocoDataset', data_root=root, ann_file=f'{root}/ann.json')
    assert other == dict(type='CocoDataset', data_root=root, data_prefix=dict(img=f'{root}/img'))
    assert cfg.val_evaluator[0].ann_file == f'{root}/x.json'
    assert cfg.val_evaluator[1].type == 'data/ab/y'
    assert cfg.work_dir == 'data/a/run'
    with pytest.raises(CommandError, match='joins several'):
        evaluate_on_train(cfg)


def part(root: str) -> dict:
    return dict(type='CocoDataset', data_root=root, ann_file='train.json')


@pytest.mark.parametrize(
    'loaders',
    [
        dict(train_dataloader=dict(dataset=dict(datasets=[part('data/a'), part('data/b/')]))),
        # The held-out images would be the training images, of the same name in both.
        dict(
            train_dataloader=dict(dataset=part('data/a')),
            val_dataloader=dict(dataset=part('data/b')),
        ),
    ],
)
def test_several_roots_do_not_become_one(tmp_path, loaders):
    cfg = Config(loaders)
    before = cfg.to_dict()
    message = told(set_data_root, cfg, str(tmp_path))
    assert message.startswith('--data-root: the datasets of the config have the roots data/a, ')
    assert 'train_dataloader.dataset' in message
    assert message.endswith('.data_root=DIR')
    assert cfg.to_dict() == before


@pytest.mark.parametrize('train', [{}, dict(train_dataloader=None)])
def test_no_training_data_to_evaluate_on(train):
    cfg = Config(dict(val_dataloader=dict(dataset=dict(type='A')), **train))
    with pytest.raises(CommandError, match='--eval-on-train: the config has no train_dataloader'):
        evaluate_on_train(cfg)


def test_repeat_dataset_of_mmdet(tmp_path):
    cfg = from_base('mmdet::common/ms-poly_3x_coco-instance.py')
    set_data_root(cfg, str(tmp_path))
    assert cfg.train_dataloader.dataset.dataset.data_root == str(tmp_path)


def test_mmpretrain_config(tmp_path):
    cfg = from_base('mmpretrain::_base_/datasets/imagenet_bs32.py')
    set_data_root(cfg, str(tmp_path))
    for split, name in (('train', 'train'), ('val', 'val'), ('test', 'val')):
        dataset = cfg[f'{split}_dataloader'].dataset
        assert (dataset.data_root, dataset.split) == (str(tmp_path), name)
    evaluate_on_train(cfg)
    assert cfg.val_dataloader.dataset.split == cfg.test_dataloader.dataset.split == 'train'


def test_nothing_to_replace(tmp_path):
    with pytest.raises(CommandError, match='no dataset of the config has a data_root'):
        set_data_root(Config(dict(train_dataloader=dict(dataset=dict(type='A')))), str(tmp_path))


def test_evaluation_on_the_training_images(tmp_path, capsys):
    cfg = coco()
    pipeline = cfg.val_dataloader.dataset.pipeline
    set_data_root(cfg, str(tmp_path))
    evaluate_on_train(cfg)
    for split in ('val', 'test'):
        dataset = cfg[f'{split}_dataloader'].dataset
        assert dataset.ann_file == 'annotations/instances_train2017.json'
        assert dataset.data_prefix.img == 'train2017/'
        assert dataset.test_mode
        assert dataset.pipeline == pipeline
        file = f'{tmp_path}/annotations/instances_train2017.json'
        assert cfg[f'{split}_evaluator'].ann_file == file
    assert capsys.readouterr().err == (
        'warning: evaluating on the training images (--eval-on-train)\n'
    )


def cifar100() -> Config:
    pytest.importorskip('mmpretrain')
    return Config.fromfile(CONFIGS / 'cifar100' / 'resnet50_bn_cifar100.py')


def test_cifar_archive(tmp_path):
    (tmp_path / 'cifar-100-python').mkdir()
    (tmp_path / 'cifar-100-python' / 'train').touch()
    cfg, before = cifar100(), cifar100()
    set_data_root(cfg, str(tmp_path))
    for split in ('train', 'val', 'test'):
        dataset = before[f'{split}_dataloader'].dataset
        assert cfg[f'{split}_dataloader'].dataset == {**dataset, 'data_root': str(tmp_path)}


def test_cifar_in_class_folders(tmp_path):
    for split in ('train', 'test'):
        (tmp_path / split / 'apple').mkdir(parents=True)
    cfg, before = cifar100(), cifar100()
    set_data_root(cfg, str(tmp_path))
    for split, folder in (('train', 'train'), ('val', 'test'), ('test', 'test')):
        dataset = cfg[f'{split}_dataloader'].dataset
        assert dataset.type == 'CachedImageFolder'
        assert (dataset.data_root, dataset.data_prefix) == (str(tmp_path), folder)
        assert dataset.pipeline == before[f'{split}_dataloader'].dataset.pipeline
        assert not {'split', 'download'} & dataset.keys()
    evaluate_on_train(cfg)
    assert cfg.val_dataloader.dataset.data_prefix == 'train'


@pytest.mark.parametrize(
    ('part', 'own', 'expected'),
    [
        (dict(indices=45000), dict(indices=-5000), dict(indices=45000)),
        ({}, dict(indices=-5000), {}),
        (dict(indices=[5, 6, 7]), dict(indices=2), dict(indices=[5, 6, 7])),
        (dict(indices=-8), dict(indices=4), dict(indices=-8)),
        (dict(indices=8), dict(indices=4), dict(indices=4)),
        (dict(indices=8), dict(indices=10), dict(indices=8)),
        (dict(indices=None), dict(indices=4), dict(indices=4)),
    ],
)
def test_evaluation_takes_the_part_that_training_takes_or_less_of_it(part, own, expected):
    data = dict(type='CIFAR10', data_root='data', split='train')
    held_out = dict(dataset=dict(data, **own))
    cfg = Config(
        dict(
            train_dataloader=dict(dataset=dict(data, **part)),
            val_dataloader=held_out,
            test_dataloader=held_out,
            val_evaluator=dict(type='Accuracy'),
            test_evaluator=dict(type='Accuracy'),
        )
    )
    evaluate_on_train(cfg)
    for split in ('val', 'test'):
        assert cfg[f'{split}_dataloader'].dataset == dict(data, **expected)

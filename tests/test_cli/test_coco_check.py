"""Own COCO data that does not fit: the file, the classes, the images, the heads."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from told import told

pytest.importorskip('mmdet')

from mmdet.datasets import CocoDataset

from mmubn.cli.class_check import check_classes
from mmubn.cli.data_check import check_data
from mmubn.cli.errors import CommandError

SCOPE = 'mmdet'
NAMES = ('thing', 'other')
SPLITS = ('train', 'val')


def content(names=NAMES, first=0) -> dict:
    images, annotations = [], []
    for n in range(first, first + 4):
        images.append(dict(id=n, file_name=f'{n}.png', width=64, height=64))
        polygon = [10, 10, 50, 10, 50, 50, 10, 50]
        entry = dict(id=n + 1, image_id=n, category_id=1 + n % 2, iscrowd=0, area=1600)
        annotations.append({**entry, 'bbox': [10, 10, 40, 40], 'segmentation': [polygon]})
    categories = [dict(id=k + 1, name=name) for k, name in enumerate(names)]
    return dict(images=images, annotations=annotations, categories=categories)


def write(split: str, data) -> None:
    Path('annotations').mkdir(exist_ok=True)
    Path(f'annotations/{split}.json').write_text(
        data if isinstance(data, str) else json.dumps(data)
    )


def dataset(split: str) -> dict:
    return dict(
        type='CocoDataset',
        data_root='.',
        ann_file=f'annotations/{split}.json',
        data_prefix=dict(img=f'{split}/'),
        metainfo=dict(classes=NAMES),
        filter_cfg=dict(filter_empty_gt=True, min_size=32),
        pipeline=[dict(type='LoadAnnotations', with_bbox=True, with_mask=True)],
        test_mode=split != 'train',
    )


@pytest.fixture
def cfg() -> Config:
    for split, first in (('train', 0), ('val', 4)):
        Path(split).mkdir()
        for n in range(first, first + 4):
            cv2.imwrite(f'{split}/{n}.png', np.zeros((64, 64, 3), np.uint8))
        write(split, content(first=first))
    return Config(
        dict(
            train_dataloader=dict(dataset=dataset('train')),
            val_dataloader=dict(dataset=dataset('val')),
            val_evaluator=dict(type='CocoMetric', ann_file='annotations/val.json'),
        )
    )


def failure(cfg: Config) -> str:
    return told(check_data, cfg, SPLITS)


def test_sound_data(cfg, capsys):
    check_data(cfg, SPLITS)
    assert not capsys.readouterr().err


def test_a_batch_that_is_larger_than_the_data(cfg):
    cfg.train_dataloader.update(batch_size=4, drop_last=True)
    check_data(cfg, SPLITS)
    cfg.train_dataloader.dataset.indices = 3
    assert failure(cfg).startswith(
        'train_dataloader.drop_last=True: 3 images for each process are no whole batch of 4, so'
    )
    cfg.train_dataloader.batch_sampler = dict(type='AspectRatioBatchSampler', drop_last=True)
    check_data(cfg, SPLITS)


def edited(change) -> dict:
    data = content()
    change(data)
    return data


@pytest.mark.parametrize(
    ('data', 'reason'),
    [
        ('', 'is not whole JSON (it is empty)'),
        ('{"images": [', 'is not whole JSON (Expecting value'),
        ('\x00\x01', 'is not whole JSON'),
        ('[]', "has no list 'images'; COCO's layout has images, annotations, categories"),
        ('{}', "has no list 'images'"),
        (edited(lambda d: d.pop('annotations')), "has no list 'annotations'"),
        (edited(lambda d: d.update(categories={})), "has no list 'categories'"),
        (edited(lambda d: d.update(images=[])), 'annotations of 4 whose image_id is not in its im'),
        (edited(lambda d: d.update(images=[], annotations=[])), 'has no images'),
        (edited(lambda d: d.update(annotations=[])), 'has no annotations; of 4 images none'),
        (edited(lambda d: d['images'][2].pop('width')), "has no 'width' in images[2]"),
        (edited(lambda d: d['annotations'][1].pop('bbox')), "has no 'bbox' in annotations[1]"),
        (edited(lambda d: d['annotations'][1].pop('area')), "has no 'area' in annotations[1]"),
        (edited(lambda d: d['categories'][0].pop('name')), "has no 'name' in categories[0]"),
        (edited(lambda d: d['annotations'].append(3)), "has no 'id' in annotations[4]"),
        (edited(lambda d: d['annotations'][1].update(id=1)), 'has the id 1 twice in annotations'),
        (edited(lambda d: d['images'][1].update(id=0)), 'has the id 0 twice in images'),
        (
            edited(lambda d: d['annotations'][1].update(category_id=7)),
            'has 1 annotations of 4 whose category_id is not in its categories (annotation 2: 7)',
        ),
        (
            edited(lambda d: d['annotations'][1].update(image_id='1')),
            "has 1 annotations of 4 whose image_id is not in its images (annotation 2: '1')",
        ),
        (
            edited(lambda d: [a.update(bbox=[0.1, 0.1, 0.5, 0.5]) for a in d['annotations']]),
            'has no annotation that can be used: bbox must be [x, y, width, height] in pixels',
        ),
        (edited(lambda d: d['annotations'][1].update(bbox=[1, 2])), 'has bbox=[1, 2] in annotati'),
        (edited(lambda d: d['annotations'][1].update(area=None)), 'has area=None in annotations'),
        (edited(lambda d: d['annotations'][1].update(area='9')), "area='9' in annotations[1]; it"),
        (edited(lambda d: d['images'][1].update(width='64')), "has width='64' in images[1]; it m"),
        (edited(lambda d: d['images'][1].update(file_name=None)), 'has file_name=None in images[1'),
        (edited(lambda d: d['images'][1].update(file_name=7)), 'has file_name=7 in images[1]; it'),
        (edited(lambda d: d['categories'][1].update(name=1)), 'has name=1 in categories[1]; it mu'),
        (
            edited(lambda d: d['annotations'][1].update(iscrowd='0')),
            "has iscrowd='0' in annotations[1]; it must be 0 or, for a crowd, 1",
        ),
        (
            edited(lambda d: [a.update(iscrowd=1) for a in d['annotations']]),
            'has no annotation that can be used: bbox must be',
        ),
        (
            edited(lambda d: [a.update(ignore=1) for a in d['annotations']]),
            'area above 0, iscrowd and ignore 0; of 4 images none would teach anything',
        ),
        (edited(lambda d: d['images'][1].update(id=[1])), 'has id=[1] in images[1]; it must be a'),
        (
            edited(lambda d: d['annotations'][1].update(segmentation=[1, 2, 3, 4, 5, 6])),
            'has segmentation=[1, 2, 3, 4, 5, 6] in annotation 2; it must be a list of polygons',
        ),
        (
            edited(lambda d: d['annotations'][1].update(
                segmentation=dict(counts=[100, 924], size=[32, 32])
            )),
            "'size': [32, 32]} in annotation 2; it must be size=[64, 64], counts",
        ),
        (
            edited(lambda d: d['annotations'][3].pop('segmentation')),
            'has no segmentation in 1 of 4 annotations (4), and the pipeline',
        ),
        (
            edited(lambda d: d['categories'].append(dict(id=3, name='thing'))),
            "has two categories of the name 'thing'",
        ),
    ],
)  # fmt: skip
def test_unsound_files(cfg, data, reason):
    write('train', data)
    line = failure(cfg)
    assert line.startswith('train_dataloader.dataset.ann_file: ./annotations/train.json ')
    assert reason in line


@pytest.mark.parametrize(
    ('change', 'reason'),
    [
        (lambda a: a.pop('iscrowd'), "no 'iscrowd' in annotation 6; the evaluator needs 0 or"),
        (lambda a: a.update(iscrowd=None), 'iscrowd=None in annotation 6; the evaluator'),
        (lambda a: a.update(id='b-6'), "the id 'b-6' in annotations; the evaluator needs numbers"),
        (lambda a: a.update(segmentation=[[1, 2, 3, 4]]), 'segmentation=[[1, 2, 3, 4]] in annot'),
        (lambda a: a.update(segmentation=[]), 'segmentation=[] in annotation 6; it must be a list'),
        (lambda a: a.pop('segmentation'), 'segmentation=None in annotation 6; it must be a list'),
    ],
)
def test_what_the_evaluator_could_not_read(cfg, change, reason):
    data = content(first=4)
    change(data['annotations'][1])
    del cfg.val_dataloader.dataset['pipeline']
    write('val', data)
    cfg.val_evaluator.metric = ['bbox', 'segm']
    assert failure(cfg).startswith(
        f'val_dataloader.dataset.ann_file: ./annotations/val.json has {reason}'
    )
    # Nobody needs it in training.
    write('val', content(first=4))
    data = content()
    change(data['annotations'][1])
    if data['annotations'][1].get('segmentation'):
        write('train', data)
        check_data(cfg, SPLITS)


def test_the_id_that_stands_for_nothing_in_the_evaluator(cfg, capsys):
    for split, first in (('train', 0), ('val', 4)):
        data = content(first=first)
        for number, annotation in enumerate(data['annotations']):
            annotation['id'] = number
        write(split, data)
    check_data(cfg, SPLITS)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        'warning: val_dataloader.dataset.ann_file: ./annotations/val.json has the annotation id 0, '
        'and the evaluator counts what detects it as wrong, which lowers the AP; number them from 1'
    )
    data['annotations'][0]['id'] = '7'  # a text that is a number will do
    write('val', data)
    check_data(cfg, SPLITS)
    assert not capsys.readouterr().err


def test_annotations_beside_crowds(cfg):
    data = content()
    for annotation in data['annotations'][1:]:
        annotation['iscrowd'] = 1
    del data['annotations'][3]['segmentation']
    write('train', data)  # mmdet reads the mask of a crowd too
    assert 'has no segmentation in 1 of 4 annotations (4), and the pipeline' in failure(cfg)
    data['annotations'][3]['ignore'] = 1  # but nothing of what it leaves out
    write('train', data)
    check_data(cfg, SPLITS)


@pytest.mark.parametrize(
    ('change', 'reason'),
    [
        (dict(area=0), 'such as 2 with bbox=[10, 10, 40, 40], area=0: bbox must be [x, y, width, '),
        (dict(bbox=[0.1, 0.1, 0.6, 0.6]), 'such as 2 with bbox=[0.1, 0.1, 0.6, 0.6], area=1600: '),
        (dict(bbox=[64, 10, 5, 5]), 'such as 2 with bbox=[64, 10, 5, 5], area=1600: bbox must be'),
        (dict(area=0, ignore=1), ''),
    ],
)
def test_boxes_that_are_left_out_are_told(cfg, change, reason, capsys):
    for split, first in (('train', 0), ('val', 4)):
        data = content(first=first)
        data['annotations'][1].update(change)
        write(split, data)
    check_data(cfg, SPLITS)
    warned = capsys.readouterr().err
    start = 'warning: train_dataloader.dataset.ann_file: mmdet leaves out 1 of 4 annotations of '
    assert warned.startswith(f'{start}./annotations/train.json, {reason}' if reason else '')
    assert warned.count('warning') == bool(reason)


def test_results_that_are_only_written_need_no_crowds(cfg):
    data = content(first=4)
    del data['annotations'][1]['iscrowd']
    write('val', data)
    cfg.val_evaluator.format_only = True
    check_data(cfg, SPLITS)
    cfg.val_evaluator.ann_file = 'annotations/train.json'
    assert 'lacks images of val_dataloader' in failure(cfg)


def test_bytes_that_are_no_text(cfg):
    Path('annotations/train.json').write_bytes(b'\xff\xfe\x00')
    assert 'is not whole JSON' in failure(cfg)


@pytest.mark.parametrize(
    ('metainfo', 'reason'),
    [
        (dict(classes='thing'), "is a string, and no file of names; one class is written with "),
        (dict(classes=()), 'must be the names of the classes, each once'),
        (dict(classes=(0, 1)), 'must be the names of the classes, each once'),
        (dict(classes=('thing', 'thing')), 'must be the names of the classes, each once'),
        (dict(CLASSES=NAMES), "nothing reads 'CLASSES', did you mean 'classes'?"),
        (dict(classess=NAMES), "nothing reads 'classess', did you mean 'classes'?"),
        (NAMES, "metainfo: must be a dict, got ('thing', 'other')"),
        (
            dict(classes=('person', 'car')),
            ".metainfo.classes: 'person', 'car' of the 2 classes are no categories of "
            "./annotations/train.json; its categories are 'thing', 'other': write "
            "metainfo=dict(classes=('thing', 'other')) in every dataset, and num_classes=2 in",
        ),
        (dict(classes=('thing', 'Other')), "'Other' of the 2 classes are no categories of "),
        (dict(classes=('thing', 'othr')), "did you mean 'other'?; its categories are"),
        (
            dict(classes=('other', 'thing')),
            "in the order of the categories in ./annotations/train.json, which is 'thing', 'other'",
        ),
        (None, ".metainfo: 'person', 'bicycle', 'car', 'motorcycle', 'airplane', 'bus' and 74 more"
         ' of the 80 classes (those of CocoDataset) are no categories of'),
    ],
)  # fmt: skip
def test_classes_that_the_file_has_not(cfg, metainfo, reason):
    cfg.train_dataloader.dataset.metainfo = metainfo
    assert reason in failure(cfg)


def test_classes_from_a_file(cfg):
    Path('names.txt').write_text('thing\nother\n')
    cfg.train_dataloader.dataset.metainfo = dict(classes='names.txt')
    check_data(cfg, SPLITS)


def test_categories_that_are_left_out(cfg, capsys):
    for split in SPLITS:
        cfg[f'{split}_dataloader'].dataset.metainfo = dict(classes=('thing',))
    check_data(cfg, SPLITS)
    warnings = capsys.readouterr().err.splitlines()
    assert warnings[0] == (
        'warning: train_dataloader.dataset.metainfo.classes: 2 annotations of '
        "./annotations/train.json are left out, of categories that are not named: 'other'"
    )


def test_splits_that_number_the_classes_otherwise(cfg):
    write('val', content(names=('other', 'thing'), first=4))
    assert failure(cfg).startswith('val_dataloader.dataset.metainfo.classes: mmdet numbers the')
    write('val', content(names=('thing', 'strange'), first=4))
    assert "'other' of the 2 classes are no categories of ./annotations/val.json" in failure(cfg)


def test_missing_images(cfg):
    Path('train/2.png').unlink()
    assert failure(cfg) == (
        'train_dataloader.dataset.data_prefix.img: ./train/ has no 2.png; 1 of 4 images of '
        './annotations/train.json are missing; name the folder of these images, or leave them out '
        'of the file'
    )
    cfg.train_dataloader.dataset.indices = 2  # those that are read are there
    check_data(cfg, SPLITS)


def test_a_link_that_leads_to_no_image(cfg):
    Path('store').mkdir()
    Path('train/2.png').rename('store/2.png')
    Path('train/2.png').symlink_to(Path('store/2.png').absolute())
    check_data(cfg, SPLITS)
    Path('store').rename('moved')
    Path('train/unasked.png').symlink_to('unasked.png')
    assert './train/ has no 2.png; 1 of 4 images of ./annotations/train.json are' in failure(cfg)


@pytest.mark.parametrize('prefix', [None, 'train/', dict(img_path='train/')])
def test_where_the_images_are(cfg, prefix):
    cfg.train_dataloader.dataset.data_prefix = prefix
    line = failure(cfg)
    assert 'train_dataloader.dataset.data_prefix' in line
    assert 'dict(img=...)' in line


def test_train_and_val_swapped(cfg):
    cfg.train_dataloader.dataset.ann_file = 'annotations/val.json'
    assert './train/ has no 4.png; 4 of 4 images of ./annotations/val.json are mi' in failure(cfg)


def test_images_in_folders_of_their_own(cfg):
    data = content()
    for image in data['images']:
        image['file_name'] = f'deep/{image["file_name"]}'
    write('train', data)
    assert './train/ has no deep/0.png; 4 of 4' in failure(cfg)
    Path('train/deep').mkdir()
    for image in data['images']:
        Path(f'train/{image["file_name"]}').touch()
    check_data(cfg, SPLITS)


def test_evaluator_of_other_data(cfg):
    cfg.val_evaluator.ann_file = 'annotations/train.json'
    line = failure(cfg)
    assert line.startswith('val_evaluator.ann_file: annotations/train.json lacks images of va')
    write('other', content(names=('other', 'thing'), first=4))
    cfg.val_evaluator.ann_file = 'annotations/other.json'
    assert "numbers the classes 'other', 'thing', and val_dataloader.dataset.ann" in failure(cfg)
    write('other', renamed(content(first=4), 'there/'))
    check_data(cfg, SPLITS)  # the same images in another folder
    write('other', renamed(content(first=4), 'other_'))
    assert 'has image 4 as other_4.png, and val_dataloader.dataset.ann_file' in failure(cfg)


def test_images_that_are_evaluated_and_not_read(cfg, capsys):
    data = content(first=4)
    for number in range(3):
        data['images'].append({**data['images'][0], 'id': 90 + number})
    write('other', data)
    cfg.val_evaluator.ann_file = 'annotations/other.json'
    check_data(cfg, SPLITS)
    assert not capsys.readouterr().err  # nothing to miss in them
    data['annotations'].append({**data['annotations'][0], 'id': 99, 'image_id': 90})
    write('other', data)
    check_data(cfg, SPLITS)
    assert capsys.readouterr().err == (
        'warning: val_evaluator.ann_file: annotations/other.json has 1 images with annotations '
        'that the data set does not read: nothing is detected in them, which lowers the AP; name a '
        'file without them\n'
    )
    cfg.val_evaluator.ann_file = 'annotations/val.json'
    cfg.val_dataloader.dataset.indices = 1
    check_data(cfg, SPLITS)
    assert 'val.json has 3 images with annotations that the data' in capsys.readouterr().err


def renamed(data: dict, prefix: str) -> dict:
    for image in data['images']:
        image['file_name'] = prefix + image['file_name']
    return data


@pytest.mark.parametrize(
    'wrap',
    [
        lambda inner: dict(type='RepeatDataset', times=2, dataset=inner),
        lambda inner: dict(type='ClassBalancedDataset', oversample_thr=1e-3, dataset=inner),
        lambda inner: dict(type='ConcatDataset', datasets=[dataset('val'), inner]),
        lambda inner: dict(
            type='MultiImageMixDataset', dataset=dict(type='RepeatDataset', times=2, dataset=inner)
        ),
    ],
)
def test_inside_of_datasets_that_join_or_repeat(cfg, wrap):
    cfg.train_dataloader.dataset = wrap(dataset('train'))
    check_data(cfg, SPLITS)
    write('train', '{')
    assert 'annotations/train.json is not whole JSON' in failure(cfg)


def test_test_images_without_annotations(cfg):
    data = content(first=4)
    del data['annotations']
    write('val', data)
    assert "has no list 'annotations'" in failure(cfg)
    cfg.test_dataloader = cfg.val_dataloader
    cfg.test_evaluator = dict(type='CocoMetric', format_only=True, outfile_prefix='out')
    check_data(cfg, ('test',))


def model(base: str, **changes):
    cfg = Config.fromstring(f"_base_ = 'mmdet::{base}'", '.py')
    cfg.merge_from_dict({'model.backbone.init_cfg': None, **changes})
    with torch.device('meta'):
        return cfg.model, MODELS.build(cfg.model)


MASK = 'model.roi_head.mask_head.num_classes'
BOX = 'model.roi_head.bbox_head'


@pytest.mark.parametrize(
    ('base', 'right', 'wrong'),
    [
        ('mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', [f'{BOX}.num_classes', MASK], [MASK]),
        (
            'cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py',
            [f'{BOX}.{stage}.num_classes' for stage in range(3)],
            [f'{BOX}.2.num_classes'],
        ),
        (
            'retinanet/retinanet_r50_fpn_1x_coco.py',
            ['model.bbox_head.num_classes'],
            ['model.bbox_head.num_classes'],
        ),
        ('ssd/ssd300_coco.py', ['model.bbox_head.num_classes'], ['model.bbox_head.num_classes']),
    ],
)
def test_num_classes_of_the_heads(cfg, base, right, wrong):
    found = check_data(cfg, SPLITS)
    cfg.model, built = model(base, **dict.fromkeys(right, 2))
    check_classes(cfg, built, found)
    for number in (1, 80):
        cfg.model, built = model(
            base, **{**dict.fromkeys(right, 2), **dict.fromkeys(wrong, number)}
        )
        assert told(check_classes, cfg, built, found) == (
            f'{wrong[0]}={number}, and there are 2 classes of train_dataloader.dataset '
            f'(CocoDataset); give --cfg-options {wrong[0]}=2'
        )


def test_augments_of_batches_have_no_class(cfg):
    """As YOLOX and Mask2Former have them; mmpretrain's, which mix labels, count the classes."""
    key = 'model.bbox_head.num_classes'
    cfg.model, built = model('yolox/yolox_s_8xb8-300e_coco.py', **{key: 2})
    assert built.data_preprocessor.batch_augments
    check_classes(cfg, built, check_data(cfg, SPLITS))


@pytest.mark.parametrize(
    'change',
    [
        dict(backend_args=dict(backend='petrel', path_mapping={'./': 's3://bucket/'})),
        dict(data_root='s3://bucket/'),
        dict(data_root='', ann_file='s3://bucket/train.json'),
        dict(data_prefix=dict(img='s3://bucket/train/')),
        dict(pipeline=[dict(type='LoadImageFromFile', backend_args=dict(backend='petrel'))]),
    ],
)
def test_other_backends_are_left_to_mmdet(cfg, change):
    missing = dict(data_root='none', ann_file='none.json', data_prefix=dict(img='none/'))
    for split in SPLITS:
        cfg[f'{split}_dataloader'].dataset.update({**missing, **change})
    cfg.val_evaluator = dict(type='CocoMetric', ann_file='s3://bucket/val.json')
    cfg.model, built = model('retinanet/retinanet_r50_fpn_1x_coco.py')
    with pytest.raises(CommandError, match=r'num_classes=80, and there are 2 classes of'):
        check_classes(cfg, built, check_data(cfg, SPLITS))


class Demanding(CocoDataset):
    def __init__(self, ann_file, **settings):
        super().__init__(ann_file=ann_file, data_prefix=dict(img=''), pipeline=[], **settings)
        self.names = self.cat_ids


class Renaming(CocoDataset):
    def parse_data_info(self, raw_data_info):
        raise NotImplementedError


class Filtering(CocoDataset):
    def filter_data(self):
        raise NotImplementedError


@pytest.mark.parametrize('kind', [Demanding, Renaming, Filtering])
def test_a_class_that_reads_in_a_way_of_its_own_is_left_to_it(cfg, kind):
    write('train', dict(images=[], annotations=[], categories=[]))
    assert 'has no image' in failure(cfg) or 'categories' in failure(cfg)
    for split in SPLITS:
        cfg[f'{split}_dataloader'].dataset.type = kind
    cfg.val_evaluator = []
    check_data(cfg, SPLITS)


def test_several_files_of_a_dataset_of_somebodys_own(cfg):
    dataset = cfg.train_dataloader.dataset
    dataset.update(type=Demanding, ann_file=['a.json', 'b.json'], data_prefix=dict(img=['a', 'b']))
    check_data(cfg, ('train',))


def test_classes_that_are_a_number(cfg):
    cfg.train_dataloader.dataset.metainfo.classes = 80
    assert 'must be the names of the classes, each once, got 80' in failure(cfg)


def test_indices_beyond_the_images(cfg):
    cfg.train_dataloader.dataset.indices = [0, 100]
    assert failure(cfg).endswith('has 4 images that are read, and indices names 100')


def test_proposals_have_no_class(cfg):
    cfg.model, built = model('rpn/rpn_r50_fpn_1x_coco.py')
    check_classes(cfg, built, check_data(cfg, SPLITS))

"""A classifier of mmpretrain and a handful of images, for the tests of the command line."""

from pathlib import Path

import cv2
import numpy as np

ROOT = Path(__file__).parents[2]  # not of tool.py: scripts outside import this file alone
CONFIG = f"""
_base_ = {str(ROOT / 'configs' / '_base_' / 'hooks.py')!r}
default_scope = 'mmpretrain'
model = dict(
    type='ImageClassifier',
    data_preprocessor=dict(num_classes=2, mean=[127.5] * 3, std=[127.5] * 3),
    backbone=dict(
        type='ResNet_CIFAR', depth=18, stem_channels=8, base_channels=8,
        norm_cfg=dict(type='UBN', fct=0.15)),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead', num_classes=2, in_channels=64, topk=(1, ),
        loss=dict(type='CrossEntropyLoss')))
pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
train_dataloader = dict(
    batch_size=4, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='CustomDataset', data_root='no/such/place', data_prefix='train', pipeline=pipeline))
val_dataloader = dict(
    batch_size=4, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='CustomDataset', data_root='no/such/place', data_prefix='val', pipeline=pipeline))
test_dataloader = val_dataloader
val_evaluator = test_evaluator = dict(type='Accuracy', topk=(1, ))
val_cfg = test_cfg = dict()
train_cfg = dict(by_epoch=True, max_epochs=1)
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.05))
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=1),
    checkpoint=dict(type='CheckpointHook', interval=1),
    visualization=dict(type='VisualizationHook'))
visualizer = dict(type='UniversalVisualizer', vis_backends=[dict(type='LocalVisBackend')])
randomness = dict(seed=0)
"""


def make_project(folder: Path) -> None:
    """Writes ``tiny.py`` and ``images/{train,val}``: dark and bright noise, four of each."""
    # Runners of one name and second share a visualizer, so a log folder: a name for each test.
    (folder / 'tiny.py').write_text(f'{CONFIG}experiment_name = {folder.name!r}\n')
    generator = np.random.default_rng(0)
    for split in ('train', 'val'):
        for name, level in (('bright', 200), ('dark', 50)):
            images = folder / 'images' / split / name
            images.mkdir(parents=True)
            for number in range(4):
                image = generator.normal(level, 20, (16, 16, 3)).clip(0, 255).astype(np.uint8)
                cv2.imwrite(str(images / f'{name}{number}.png'), image)

"""Metrics that hooks go by, before an epoch has been trained."""

import pytest
from mmengine.config import Config
from told import told
from torch import nn

pytest.importorskip('mmdet')
pytest.importorskip('mmpretrain')

from mmubn.cli.errors import CommandError
from mmubn.cli.metric_check import check_metrics

SCOPE = 'mmengine'
COCO = dict(type='mmdet.CocoMetric', ann_file='a.json', metric=['bbox', 'segm'])
ACCURACY = dict(type='mmpretrain.Accuracy', topk=(1, 5))
LABELS = dict(type='mmpretrain.SingleLabelMetric')


def check(evaluator, **hook) -> None:
    cfg = dict(default_hooks=dict(checkpoint=dict(type='CheckpointHook', **hook)))
    check_metrics(Config(dict(cfg, val_evaluator=evaluator)), nn.Module())


@pytest.mark.parametrize(
    ('evaluator', 'metric'),
    [
        (COCO, 'auto'),
        (COCO, None),
        (COCO, ['coco/bbox_mAP', 'coco/segm_mAP_50']),
        ({**COCO, 'metric_items': ['mAP_l']}, 'coco/bbox_mAP_l'),
        ({**COCO, 'prefix': 'val'}, 'val/bbox_mAP'),
        ({**COCO, 'metric': 'proposal'}, 'coco/AR@100'),
        ({**COCO, 'classwise': True}, 'coco/person_precision'),
        (ACCURACY, 'accuracy/top5'),
        ({**ACCURACY, 'topk': 1}, 'accuracy/top1'),
        ({**ACCURACY, 'thrs': (0.0, 0.5)}, 'accuracy/top1_thr-0.50'),
        ([ACCURACY, LABELS], ['accuracy/top1', 'single-label/f1-score']),
        (dict(type='mmengine.DumpResults', out_file_path='a.pkl'), 'anything'),
        ([], 'anything'),
    ],
)
def test_what_is_reported(evaluator, metric):
    check(evaluator, save_best=metric)


@pytest.mark.parametrize(
    ('evaluator', 'metric', 'reason'),
    [
        (COCO, 'coco/bbox_mAp', "'coco/bbox_mAp', did you mean 'coco/bbox_mAP'?; val_evaluator"),
        (COCO, ['coco/bbox_mAP', 'bbox_mAP'], "'bbox_mAP', did you mean 'coco/bbox_mAP'?"),
        ({**COCO, 'metric': 'bbox'}, 'coco/segm_mAP', "'coco/segm_mAP', did you mean"),
        ({**COCO, 'metric_items': ['mAP_l']}, 'coco/bbox_mAP', "'coco/bbox_mAP', did you mean"),
        (ACCURACY, 'accuracy/top_1', "'accuracy/top_1', did you mean 'accuracy/top1'?"),
        (ACCURACY, 'acc', "'acc'; val_evaluator reports 'accuracy/top1', 'accuracy/top5'"),
        ([ACCURACY, LABELS], 'label/f1', "'label/f1'; val_evaluator reports 'accuracy/top1',"),
    ],
)
def test_what_is_not(evaluator, metric, reason):
    line = f'default_hooks.checkpoint.save_best: no evaluator reports {reason}'
    assert told(check, evaluator, save_best=metric).startswith(line)
    hook = dict(type='EarlyStoppingHook', monitor=metric)
    with pytest.raises(CommandError, match=r'^custom_hooks\.0\.monitor: no evaluator reports'):
        check_metrics(Config(dict(custom_hooks=[hook], val_evaluator=evaluator)), nn.Module())

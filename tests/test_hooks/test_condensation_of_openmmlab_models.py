"""The hook on a real detector and a real classifier."""

import numpy as np
import pytest
import torch
from against_reference import pairwise
from mmengine.evaluator import BaseMetric
from mmengine.structures import InstanceData
from torch.utils.data import Dataset
from toy_runner import HOOK, column, make_runner, table


class Nothing(BaseMetric):
    """Evaluates to nothing."""

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        return {'nothing': 0.0}


class Scenes(Dataset):
    """Images of several sizes with one box each, as mmdet's pipelines leave them."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        from mmdet.structures import DetDataSample

        generator = torch.Generator().manual_seed(index)
        height, width = 48 + 8 * (index % 3), 64 - 8 * (index % 2)
        sample = DetDataSample(
            metainfo=dict(
                img_id=index,
                img_shape=(height, width),
                ori_shape=(height, width),
                scale_factor=(1.0, 1.0),
            ),
            gt_instances=InstanceData(
                bboxes=torch.tensor([[8.0, 8.0, 40.0, 40.0]]), labels=torch.tensor([index % 2])
            ),
        )
        image = torch.randint(0, 256, (3, height, width), generator=generator)
        return dict(inputs=image.to(torch.uint8), data_samples=sample)


class Pictures(Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        from mmpretrain.structures import DataSample

        generator = np.random.default_rng(index)
        image = torch.from_numpy(generator.integers(0, 256, (3, 32, 32)))
        return dict(inputs=image, data_samples=DataSample().set_gt_label(index % 2))


def loaders(dataset):
    loader = dict(
        batch_size=4,
        num_workers=0,
        dataset=dataset,
        sampler=dict(type='DefaultSampler', shuffle=False),
    )
    return dict(
        train_dataloader=loader,
        val_dataloader=dict(loader),
        val_cfg={},
        val_evaluator=[Nothing()],
        val=False,
    )


def backbone(scope, **options):
    return dict(
        type=f'{scope}.ResNet',
        depth=18,
        stem_channels=8,
        base_channels=8,
        norm_cfg=dict(type='UBN'),
        **options,
    )


def detector(head_norm=None):
    pytest.importorskip('mmdet')
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=False)
    return MODELS.build(
        dict(
            type='mmdet.FCOS',
            _scope_='mmdet',
            data_preprocessor=dict(
                type='DetDataPreprocessor', mean=[127.0] * 3, std=[60.0] * 3, pad_size_divisor=32
            ),
            backbone=backbone('mmdet', norm_eval=False),
            neck=dict(
                type='FPN',
                in_channels=[8, 16, 32, 64],
                out_channels=8,
                start_level=1,
                add_extra_convs='on_output',
                num_outs=5,
            ),
            bbox_head=dict(
                type='FCOSHead',
                num_classes=2,
                in_channels=8,
                feat_channels=8,
                stacked_convs=1,
                norm_cfg=head_norm,
            ),
            test_cfg=dict(
                nms_pre=50, score_thr=0.05, nms=dict(type='nms', iou_threshold=0.5), max_per_img=5
            ),
        )
    )


@pytest.mark.parametrize('head_norm', [None, dict(type='BN')])
def test_detector(tmp_path, head_norm):
    model = detector(head_norm)
    scenes = Scenes()
    padded = torch.full((8, 3, 64, 64), 0.0)
    chosen = torch.randperm(8, generator=torch.Generator().manual_seed(0)).tolist()
    for row, index in zip(padded, chosen):
        image = scenes[index]['inputs']
        row[:, : image.shape[1], : image.shape[2]] = (image - 127.0) / 60
    runner = make_runner(
        tmp_path, model, hooks=[dict(HOOK, fixed_samples=8)], epochs=1, **loaders(scenes)
    )
    runner.train()
    rows = table(tmp_path)
    layers = {r['layer'] for r in rows}
    assert len([name for name in layers if name.startswith('backbone.')]) == 20
    assert any(name.startswith('bbox_head.') for name in layers) == (head_norm is not None)
    assert all(abs(s) <= 1 for s in column(rows))
    with torch.no_grad():
        after = pairwise(model.backbone.conv1(padded))
    recorded = column(rows, layer='backbone.bn1', where='fixed/input')
    assert recorded[1] == pytest.approx(after, abs=1e-5)
    assert {r['type'] for r in rows if r['layer'].startswith('backbone.')} == {'UBN'}


def test_classifier_with_checkpointed_stages(tmp_path):
    pytest.importorskip('mmpretrain')
    from mmpretrain.registry import MODELS
    from mmpretrain.utils import register_all_modules

    register_all_modules(init_default_scope=False)
    model = MODELS.build(
        dict(
            type='mmpretrain.ImageClassifier',
            _scope_='mmpretrain',
            data_preprocessor=dict(num_classes=2, mean=[127.0] * 3, std=[60.0] * 3),
            backbone=backbone('mmpretrain', with_cp=True),
            neck=dict(type='GlobalAveragePooling'),
            head=dict(type='LinearClsHead', num_classes=2, in_channels=64),
        )
    )
    seen = []
    model.backbone.layer4[1].bn1.register_forward_hook(
        lambda module, args, y: (
            seen.append(pairwise(args[0]))
            if module.training and torch._C._current_graph_task_id() == -1
            else None
        )
    )
    make_runner(tmp_path, model, hooks=[HOOK], epochs=1, **loaders(Pictures())).train()
    rows = table(tmp_path)
    assert len({r['layer'] for r in rows}) == 20
    assert len(seen) == 4
    recorded = column(rows, layer='backbone.layer4.1.bn1', where='train/input')
    assert recorded == pytest.approx([sum(seen) / 4], abs=1e-6)

"""OpenMMLab's models: boxes, scores, masks and AP stay; what ONNX gets of a detector."""

import copy

import numpy as np
import pytest
import torch
from tool import CONFIGS
from weights import difference, trained

pytest.importorskip('mmdet')

from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.runner import Runner
from torch import nn

from mmubn import prepare_for_inference
from mmubn.datasets.scenes import make_scenes
from mmubn.inference.runtimes import export_onnx


def build(config: Config) -> nn.Module:
    register_all_modules()
    config.model.backbone.init_cfg = None
    return MODELS.build(config.model)


@pytest.fixture(scope='module')
def mask_rcnn():
    """Mask R-CNN R-50 with UBN in its backbone, its neck and its mask head."""
    config = Config.fromfile(CONFIGS / 'mask_rcnn_r50_ubn_1x_coco.py')
    config.model.neck.norm_cfg = config.model.roi_head.mask_head.norm_cfg = dict(type='UBN')
    # Few boxes, as each costs a mask head's pass and a mask of the image's size.
    config.model.test_cfg.rpn.max_per_img = 200
    config.model.test_cfg.rcnn.update(score_thr=0.0, max_per_img=20)
    torch.manual_seed(0)
    return trained(build(config), 0.05)


def call(size=(160, 192)):
    height, width = size
    shapes = dict(img_shape=size, ori_shape=size, batch_input_shape=size, scale_factor=(1.0, 1.0))
    images = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(1))
    return images, [DetDataSample(metainfo=shapes)], 'predict'


@torch.no_grad()
def test_boxes_scores_and_masks(mask_rcnn):
    prepared = prepare_for_inference(mask_rcnn, call())
    assert all(layer.convolution for layer in prepared.inference_report)
    assert len(prepared.inference_report) == 53 + 8 + 4
    (expected,), (actual,) = mask_rcnn(*call()), prepared(*call())
    expected, actual = expected.pred_instances, actual.pred_instances
    assert len(expected) == 20
    assert difference(actual.bboxes, expected.bboxes) < 1e-5
    assert difference(actual.scores, expected.scores) < 1e-5
    assert torch.equal(actual.labels, expected.labels)
    assert (actual.masks != expected.masks).float().mean() < 1e-4


def test_without_example_inputs_what_extract_feat_reaches(mask_rcnn):
    report = prepare_for_inference(mask_rcnn).inference_report
    reached = {layer.name: not layer.reason for layer in report}
    assert {name.split('.')[0] for name, found in reached.items() if found} == {'backbone', 'neck'}
    missed = [layer for layer in report if layer.reason]
    assert {layer.reason for layer in missed} == {'it is not called'}
    assert all(layer.name.startswith('roi_head.mask_head') for layer in missed)


class Features(nn.Module):
    """Backbone and neck as a module of their own, for an exporter."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.backbone, self.neck = detector.backbone, detector.neck

    def forward(self, images):
        return self.neck(self.backbone(images))


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
def test_backbone_and_neck_in_onnxruntime(mask_rcnn, tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime')
    features = Features(prepare_for_inference(mask_rcnn))
    export_onnx(features, call()[0], tmp_path / 'features.onnx')
    session = onnxruntime.InferenceSession(tmp_path / 'features.onnx')
    for size in ((160, 192), (128, 224)):
        images = call(size)[0]
        levels = session.run(None, {'images': images.numpy()})
        with torch.no_grad():
            expected = mask_rcnn.extract_feat(images)
        assert len(levels) == len(expected) == 5
        for actual, level in zip(levels, expected):
            assert difference(torch.from_numpy(np.asarray(actual)), level) < 1e-4


def metrics_of(runner: Runner) -> dict:
    return {name: round(float(value), 3) for name, value in runner.test().items() if 'mAP' in name}


@pytest.mark.slow
def test_ap_of_a_trained_demo_is_the_same(tmp_path):
    """Every AP that COCO's evaluation prints, to its last digit."""
    scenes = tmp_path / 'scenes'
    make_scenes(scenes, num_train=160, num_val=40)
    config = Config.fromfile(CONFIGS / 'demo' / 'mask_rcnn_r18_ubn_scenes.py')
    config.work_dir = str(tmp_path / 'work')
    config.experiment_name = tmp_path.name
    config.train_cfg.max_epochs = config.train_cfg.val_interval = 2
    config.custom_hooks = []
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.data_root = str(scenes)
    for evaluator in (config.val_evaluator, config.test_evaluator):
        evaluator.ann_file = str(scenes / 'annotations' / 'instances_val.json')
    runner = Runner.from_cfg(config)
    runner.train()
    expected = metrics_of(runner)
    assert expected['coco/bbox_mAP_50'] > 0
    trained = copy.deepcopy(runner.model.state_dict())
    runner.model = prepare_for_inference(runner.model.eval())
    assert all(layer.convolution for layer in runner.model.inference_report)
    assert runner.model.state_dict().keys() != trained.keys()
    assert metrics_of(runner) == expected

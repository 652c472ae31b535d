"""A config's own mistakes: what is left out, of another kind, or known to nobody."""

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from told import told
from tool import CONFIGS

pytest.importorskip('mmpretrain')

from mmubn.cli.config_check import check_config
from mmubn.cli.errors import CommandError
from mmubn.cli.model import build_model
from mmubn.cli.norm_check import check_norms

SCOPE = 'mmpretrain'


def config() -> Config:
    pipeline = [dict(type='LoadImageFromFile'), dict(type='RandomResizedCrop', scale=32)]
    loader = dict(
        batch_size=4,
        sampler=dict(type='DefaultSampler', shuffle=True),
        dataset=dict(type='CustomDataset', data_root='data', pipeline=pipeline),
    )
    return Config(
        dict(
            model=dict(
                type='ImageClassifier',
                backbone=dict(type='ResNet', depth=18, norm_cfg=dict(type='UBN')),
                neck=dict(type='GlobalAveragePooling'),
                head=dict(type='LinearClsHead', num_classes=2, in_channels=512),
            ),
            train_dataloader=loader,
            train_cfg=dict(by_epoch=True, max_epochs=1),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
            param_scheduler=[dict(type='MultiStepLR', milestones=[1])],
            val_dataloader=loader,
            val_cfg=dict(),
            val_evaluator=dict(type='Accuracy', topk=(1,)),
            default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1)),
            custom_hooks=[dict(type='CondensationHook', interval=20, priority=80)],
            visualizer=dict(
                type='UniversalVisualizer', vis_backends=[dict(type='LocalVisBackend')]
            ),
            randomness=dict(seed=0),
            auto_scale_lr=dict(base_batch_size=256),
            log_processor=dict(by_epoch=True),
        )
    )  # fmt: skip


def test_sound_config():
    check_config(config(), 'train')


LEFT_OUT = object()
PIPELINE = 'train_dataloader.dataset.pipeline'


@pytest.mark.parametrize(
    ('key', 'value', 'reason'),
    [
        # left out
        ('model', LEFT_OUT, 'model is left out'),
        ('train_dataloader', LEFT_OUT, 'train_dataloader is left out; train_dataloader, train_'),
        ('optim_wrapper', LEFT_OUT, 'optim_wrapper is left out'),
        ('val_evaluator', LEFT_OUT, 'val_evaluator is left out; val_dataloader, val_cfg and'),
        ('train_dataloader.sampler', LEFT_OUT, 'train_dataloader: sampler is left out'),
        ('train_dataloader.dataset', LEFT_OUT, 'train_dataloader: dataset is left out'),
        ('train_dataloader.dataset.type', LEFT_OUT, 'train_dataloader.dataset: type is left out'),
        (f'{PIPELINE}.1.scale', LEFT_OUT, 'scale is left out; RandomResizedCrop needs it'),
        ('train_cfg.by_epoch', LEFT_OUT, 'train_cfg: by_epoch is left out'),
        ('optim_wrapper.optimizer', LEFT_OUT, 'optim_wrapper: optimizer is left out'),
        ('optim_wrapper.optimizer.type', LEFT_OUT, 'optim_wrapper.optimizer: type is left out'),
        ('default_hooks.checkpoint.type', LEFT_OUT, 'default_hooks.checkpoint: type is left out'),
        ('val_evaluator.type', LEFT_OUT, 'val_evaluator: type is left out'),
        ('randomness', dict(deterministic=True), 'randomness: seed is left out'),
        # a type for a dict
        ('model', 'ResNet', "model: must be a dict, got 'ResNet'; write dict(type='ResNet', ...)"),
        ('model.backbone', 'ResNet', 'model.backbone: must be a dict'),
        ('model.backbone.norm_cfg', 'UBN', "norm_cfg: must be a dict, got 'UBN'; write dict(type"),
        ('optim_wrapper', 'SGD', 'optim_wrapper: must be a dict'),
        ('optim_wrapper.optimizer', 'SGD', 'optim_wrapper.optimizer: must be a dict'),
        ('train_dataloader.dataset', 'ImageNet', 'train_dataloader.dataset: must be a dict'),
        ('train_dataloader.sampler', 'DefaultSampler', 'train_dataloader.sampler: must be a dict'),
        (f'{PIPELINE}.0', 'LoadImageFromFile', 'pipeline.0: must be a dict'),
        ('custom_hooks.0', 'CondensationHook', 'custom_hooks.0: must be a dict'),
        ('default_hooks.checkpoint', 3, 'default_hooks.checkpoint: must be a dict'),
        ('visualizer.vis_backends.0', 'LocalVisBackend', 'vis_backends.0: must be a dict'),
        ('val_evaluator', 'Accuracy', 'val_evaluator: must be a dict or a list'),
        # a dict for a list, and a list for a dict
        ('custom_hooks', dict(type='CondensationHook'), 'custom_hooks: must be a list, got a dict'),
        (PIPELINE, dict(type='PackInputs'), 'pipeline: must be a list'),
        ('visualizer.vis_backends', dict(type='LocalVisBackend'), 'must be a list, got a dict; pu'),
        ('default_hooks', [dict(type='CheckpointHook')], 'default_hooks: must be a dict, got a li'),
        ('train_dataloader', [], 'train_dataloader: must be a dict, got a list'),
        # unknown
        ('train_dataloader.batch_sise', 4, "takes no 'batch_sise', did you mean 'batch_size'?"),
        ('train_dataloader.dataset.indicies', 4, "did you mean 'indices'?"),
        ('train_dataloader.dataset.type', 'CustomDatset', "did you mean 'CustomDataset'?"),
        (f'{PIPELINE}.1.scales', 3, "RandomResizedCrop takes no 'scales', did you mean 'scale'"),
        ('train_cfg.max_epoch', 3, "EpochBasedTrainLoop takes no 'max_epoch', did you mean 'max_"),
        ('optim_wrapper.optimizer.learning_rate', 3, "SGD takes no 'learning_rate'"),
        ('optim_wrapper.optimizer.type', 'SDG', "no optimizer is registered as 'SDG', did you me"),
        ('optim_wrapper.clip_grads', dict(), "did you mean 'clip_grad'?"),
        (
            'optim_wrapper.clip_grad',
            dict(max_nrm=1),
            "takes no 'max_nrm', did you mean 'max_norm'?",
        ),
        ('optim_wrapper.clip_grad', dict(norm_type=2), 'optim_wrapper.clip_grad: max_norm is left'),
        ('optim_wrapper.clip_grad', dict(type='nrm'), "must be norm or value, got 'nrm'"),
        ('optim_wrapper.clip_grad', 35, 'optim_wrapper.clip_grad: must be a dict, got 35'),
        (
            'optim_wrapper.paramwise_cfg',
            dict(norm_decay_multt=0),
            "takes no 'norm_decay_multt', did you mean 'norm_decay_mult'?",
        ),
        ('param_scheduler.0.gama', 0.1, "did you mean 'gamma'?"),
        ('custom_hooks.0.intervall', 3, "custom_hooks.0: CondensationHook takes no 'intervall', "),
        ('custom_hooks.0.type', 'CondensationHok', "did you mean 'CondensationHook'?"),
        ('val_evaluator.top_k', 3, "Accuracy takes no 'top_k', did you mean 'topk'?"),
        ('randomness.sed', 3, "randomness takes no 'sed', did you mean 'seed'?"),
        ('auto_scale_lr.base_batchsize', 3, "did you mean 'base_batch_size'?"),
    ],
)
def test_mistakes(key, value, reason):
    cfg = config()
    *way, last = key.split('.')
    node = cfg
    for part in way:
        node = node[int(part) if part.isdigit() else part]
    if value is LEFT_OUT:
        node.pop(last)
    else:
        node[int(last) if last.isdigit() else last] = value
    assert reason in told(check_config, cfg, 'train')


class HandsOn(torch.optim.SGD):
    """Takes what it hands on, or not: nobody can see it from outside."""

    def __init__(self, params, **defaults):
        super().__init__(params, **{'lr': 0.1, **{k: v for k, v in defaults.items() if k == 'lr'}})


@pytest.mark.parametrize(
    ('key', 'value'),
    [
        ('optim_wrapper.optimizer', dict(type=HandsOn, lr=0.1, own=3)),
        ('optim_wrapper.paramwise_cfg', dict(_delete_=True, norm_decay_mult=0)),
        ('env_cfg', dict(own=3)),
    ],
)
def test_a_key_that_may_be_read_is_told(key, value, capsys):
    cfg = config()
    cfg.merge_from_dict({key: value})
    if key.endswith('optimizer'):
        cfg.optim_wrapper.optimizer = value
    check_config(cfg, 'train')
    name = next(name for name in value if name not in ('type', 'lr', 'norm_decay_mult'))
    assert f"takes no '{name}', as far as can be seen" in capsys.readouterr().err


def test_mistakes_inside_of_the_model():
    cfg = config()
    cfg.model.backbone.norm_cfg = dict(fct=0.1)
    with pytest.raises(CommandError, match=r'^model\.backbone\.norm_cfg: type is left out; write'):
        check_norms(cfg)
    cfg = config()
    cfg.model.backbone.dept = 50
    with pytest.raises(CommandError, match=r"^model\.backbone: .*keyword argument 'dept'"):
        build_model(cfg)
    cfg = config()
    cfg.model.head.pop('in_channels')
    with pytest.raises(CommandError, match=r"^model\.head: .*missing .*'in_channels'"):
        build_model(cfg)
    cfg = config()
    cfg.model.backbone.pop('type')
    with pytest.raises(CommandError, match=r'^model: a type is left out'):
        build_model(cfg)


def test_evaluation_alone_needs_no_training():
    cfg = config()
    for name in ('dataloader', 'cfg', 'evaluator'):
        cfg[f'test_{name}'] = cfg[f'val_{name}']
    for key in ('train_dataloader', 'train_cfg', 'optim_wrapper', 'param_scheduler'):
        cfg.pop(key)
    check_config(cfg, 'test')
    with pytest.raises(CommandError, match='train_dataloader is left out'):
        check_config(cfg, 'train')


@pytest.mark.parametrize(
    'name',
    [
        'mask_rcnn_r18_small_coco',
        'demo/resnet18_ubn_shapes',
        'cifar10/resnet18_small_cifar10',
        'imagenet/resnet50_ubn_imagenet',
    ],
)
def test_the_projects_own_configs(name):
    pytest.importorskip('mmdet')
    cfg = Config.fromfile(CONFIGS / f'{name}.py')
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        check_config(cfg, 'train')
        check_config(cfg, 'test')


@pytest.mark.parametrize(
    'name',
    [
        'mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py',
        'mmdet::ssd/ssd300_coco.py',
        'mmdet::yolox/yolox_s_8xb8-300e_coco.py',
        'mmdet::detr/detr_r50_8xb2-150e_coco.py',
        'mmdet::pascal_voc/faster-rcnn_r50_fpn_1x_voc0712.py',
        'mmdet::common/ms-poly_3x_coco-instance.py',
        'mmdet::lvis/mask-rcnn_r50_fpn_sample1e-3_ms-1x_lvis-v1.py',
        'mmpretrain::resnet/resnet50_8xb256-rsb-a1-600e_in1k.py',
        'mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py',
        'mmpretrain::simclr/simclr_resnet50_16xb256-coslr-200e_in1k.py',
    ],
)
def test_the_hosts_configs(name):
    scope = name.split('::')[0]
    pytest.importorskip(scope)
    cfg = Config.fromstring(f"_base_ = '{name}'", '.py')
    if cfg.get('model') is None:
        cfg.model = dict(type='Any')
        for key in ('optim_wrapper', 'param_scheduler', 'train_cfg', 'train_dataloader'):
            cfg.pop(key, None)
    with DefaultScope.overwrite_default_scope(scope):
        check_config(cfg, 'train' if cfg.get('train_dataloader') else 'test')

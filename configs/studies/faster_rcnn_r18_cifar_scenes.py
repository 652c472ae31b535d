# Faster R-CNN for the scenes of `tools/reproduce.py run batches-of-two`: CIFAR-10's objects pasted
# on CIFAR-100's pictures, 96x96. A quarter of ResNet-18's channels, narrow heads, and what mmdet
# does on COCO: 2 images per step, the stem and first stage frozen, SGD.
_base_ = ['mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', '../_base_/hooks.py']
custom_imports = dict(imports=['mmubn', 'mmpretrain.models'], allow_failed_imports=False)

classes = (
    *('airplane', 'automobile', 'bird', 'cat', 'deer'),
    *('dog', 'frog', 'horse', 'ship', 'truck'),
)
data_root = 'data/cifar_scenes/'
image_scale = (96, 96)
channels = 64
strides = [4, 8, 16]
epochs = 4

model = dict(
    data_preprocessor=dict(
        # Those of the pretraining.
        mean=[129.304, 124.070, 112.434],
        std=[68.170, 65.392, 70.418],
    ),
    backbone=dict(
        _delete_=True,
        type='mmpretrain.ResNet_CIFAR',
        depth=18,
        stem_channels=16,
        base_channels=16,
        strides=(2, 2, 2, 2),
        out_indices=(1, 2, 3),
        frozen_stages=1,
        norm_cfg=dict(type='BN'),
        norm_eval=False,
    ),
    neck=dict(in_channels=[32, 64, 128], out_channels=channels, num_outs=len(strides)),
    rpn_head=dict(
        in_channels=channels,
        feat_channels=channels,
        # Objects are 18 to 78 pixels wide: anchors of 12, 17, 24, 34, 48 and 68.
        anchor_generator=dict(scales=[3, 4.24], strides=strides),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(
            out_channels=channels,
            featmap_strides=strides,
            finest_scale=14,
            roi_layer=dict(sampling_ratio=2),
        ),
        bbox_head=dict(
            in_channels=channels,
            fc_out_channels=256,
            num_classes=len(classes),
            reg_class_agnostic=True,
        ),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=128)),
        rpn_proposal=dict(nms_pre=300, max_per_img=150),
        rcnn=dict(sampler=dict(num=64)),
    ),
    test_cfg=dict(
        rpn=dict(nms_pre=300, max_per_img=150),
        # No detection would be no AP, and a run without a result.
        rcnn=dict(score_thr=0.0, max_per_img=50),
    ),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='RandomFlip', prob=0.5),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'flip', 'flip_direction'),
    ),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=image_scale, keep_ratio=True),  # for its scale_factor
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]
# No workers: trainings run side by side, and a scene takes a millisecond to read.
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        data_root=data_root,
        ann_file='annotations/instances_train.json',
        data_prefix=dict(img='train/'),
        metainfo=dict(classes=classes),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=10,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        data_root=data_root,
        ann_file='annotations/instances_test.json',
        data_prefix=dict(img='test/'),
        metainfo=dict(classes=classes),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_test.json')
test_evaluator = val_evaluator

train_cfg = dict(max_epochs=epochs, val_interval=epochs)
optim_wrapper = dict(
    optimizer=dict(lr=0.01),  # each norm's is tuned
    clip_grad=dict(max_norm=10, norm_type=2),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(
        type='CosineAnnealingLR',
        by_epoch=True,
        begin=0,
        end=epochs,
        convert_to_iter_based=True,
        eta_min_ratio=0.02,
    ),
]
auto_scale_lr = dict(base_batch_size=2)
default_hooks = dict(logger=dict(interval=25), checkpoint=dict(max_keep_ckpts=1))

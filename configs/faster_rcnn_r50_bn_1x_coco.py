_base_ = ['mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', '_base_/hooks.py']

# The baseline of faster_rcnn_r50_ubn_1x_coco.py: its BN trains, as UBN does there.
model = dict(backbone=dict(norm_cfg=dict(type='BN', requires_grad=True), norm_eval=False))

_base_ = ['mmdet::mask_rcnn/mask-rcnn_r101_fpn_1x_coco.py', '_base_/hooks.py']

# The baseline of mask_rcnn_r101_ubn_1x_coco.py: its BN trains, as UBN does there.
model = dict(backbone=dict(norm_cfg=dict(type='BN', requires_grad=True), norm_eval=False))

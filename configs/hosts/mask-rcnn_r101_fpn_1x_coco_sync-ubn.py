# Statistics of all processes, which train: norm_eval=True would freeze them.
_base_ = ['mmdet::mask_rcnn/mask-rcnn_r101_fpn_1x_coco.py', '../_base_/hooks.py']

model = dict(
    backbone=dict(norm_cfg=dict(type='SyncUBN', fct=0.15, requires_grad=True), norm_eval=False)
)

_base_ = ['mmdet::faster_rcnn/faster-rcnn_r101_fpn_1x_coco.py', '_base_/hooks.py']

# frozen_stages=1 stays mmdet's (stem and first stage keep the pretrained weights and
# statistics): the paper does not say. norm_eval=True, also mmdet's, would freeze every norm.
model = dict(
    backbone=dict(norm_cfg=dict(type='UBN', fct=0.15, requires_grad=True), norm_eval=False)
)

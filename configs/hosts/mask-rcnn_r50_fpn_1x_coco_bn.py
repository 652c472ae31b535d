# mmdet's own: statistics frozen by norm_eval=True.
_base_ = ['mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', '../_base_/hooks.py']

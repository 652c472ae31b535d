# mmdet's own: statistics frozen by norm_eval=True.
_base_ = ['mmdet::faster_rcnn/faster-rcnn_r101_fpn_1x_coco.py', '../_base_/hooks.py']

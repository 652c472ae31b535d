# mmdet's own: statistics frozen by norm_eval=True.
_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'

custom_imports = dict(imports=['mmubn'], allow_failed_imports=False)

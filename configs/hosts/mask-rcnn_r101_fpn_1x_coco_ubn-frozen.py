# norm_eval=True stays mmdet's: the statistics are those of the pretrained BatchNorm and the gate
# does nothing, while kernels, calibrations and affines train. Starts as the BatchNorm network.
_base_ = ['mmdet::mask_rcnn/mask-rcnn_r101_fpn_1x_coco.py', '../_base_/hooks_frozen.py']

model = dict(backbone=dict(norm_cfg=dict(type='UBN', fct=0.15, requires_grad=True)))

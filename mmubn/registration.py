"""Puts the layers into mmengine's root registry, where mmdet and mmpretrain look too.

``mmcv.cnn.build_norm_layer`` searches the scope of the running config first and
the root next, so one entry serves every OpenMMLab repository. ``force=True``
makes a reload harmless.
"""

from mmengine.registry import MODELS

from .layers import BNET, IEBN, RBN, UBN

for layer in (BNET, IEBN, RBN, UBN):
    MODELS.register_module(module=layer, force=True)

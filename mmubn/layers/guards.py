"""Refuses passes that would take a rectified layer for a plain BatchNorm.

Converters to SyncBatchNorm and fusers of convolution and norm match subclasses of
``_BatchNorm``, copy what BatchNorm has and drop the rest without a word
(pytorch#187298, timm#1254). A layer cannot see that it is being replaced, but it
can make what those passes read unusable to them: the converters of torch and
mmengine ask for ``qconfig``, the fusers compute ``running_var + eps``.
"""


class BatchNormGuard:
    """Mixin in front of ``_BatchNorm``: what such a pass reads, ``eps`` or ``qconfig``, raises."""

    @property
    def eps(self) -> float:
        r""":math:`\epsilon`; a number for everything but arithmetic with tensors."""
        return _Eps(self._eps)

    @eps.setter
    def eps(self, value: float) -> None:
        self._eps = float(value)

    def __getattr__(self, name: str):
        # No property: torch.jit and inspect walk all that dir() names.
        if name == 'qconfig':
            raise RuntimeError(
                f'{type(self).__name__} cannot become SyncBatchNorm or be quantized: its '
                'rectifications would be lost. Leave sync_bn unset and do not call '
                'convert_sync_batchnorm on a model that has this layer. For statistics over all '
                "processes use norm_cfg=dict(type='SyncUBN'), or turn the UBN of a model into it "
                "by mmubn.convert_norm(model, dict(type='SyncUBN'))."
            )
        return super().__getattr__(name)


class _Eps(float):
    """A float that no tensor can be added to."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError(
            'a rectified norm layer (UBN, RBN, BNET, IEBN) cannot be fused into a convolution as '
            'BatchNorm can: turn fuse_conv_bn and efficient_conv_bn_eval off, or convert the '
            "layer with mmubn.convert_norm(model, dict(type='BN')) where that is exact."
        )

"""Refuses what would take a rectified layer for a plain BatchNorm and lose its rectifications.

Converters to SyncBatchNorm and the like, and fusers of convolution and norm, match
subclasses of ``_BatchNorm``. They copy what BatchNorm has and silently drop the rest
(pytorch#187298, timm#1254). A layer cannot see that it is being replaced. But a converter
puts its tensors into another norm layer, and torch calls a hook for each tensor that a
module takes. And a fuser reads the running variance and adds ``eps`` to it.
"""

import sys
import weakref
from types import FrameType
from typing import Dict, Iterator, Optional

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from .leaf import Leaf

_layers: 'weakref.WeakSet[BatchNormGuard]' = weakref.WeakSet()


class BatchNormGuard(Leaf):
    """Mixin before ``_BatchNorm``: such a pass cannot use the tensors and ``eps`` of the layer."""

    def __new__(cls, *args, **kwargs):
        layer = super().__new__(cls)  # copies and pickles come here, too
        _layers.add(layer)
        return layer

    @property
    def eps(self) -> float:
        r""":math:`\epsilon`; code that also reads the running variance cannot add the two."""
        reader = sys._getframe(1).f_code
        return _Eps(self._eps) if 'running_var' in reader.co_names else self._eps

    @eps.setter
    def eps(self, value: float) -> None:
        self._eps = float(value)

    def _leaf(self, *args, **kwargs):
        names = (frame.f_code.co_name for frame in callers())
        if any(name.startswith('turn_on_efficient_conv_bn_eval') for name in names):
            raise TypeError(
                f'{type(self).__name__} cannot be traced symbolically, as efficient_conv_bn_eval '
                'does to fuse it into a convolution: turn that off'
            )
        return super()._leaf(*args, **kwargs)


class _Eps(float):
    """A float that no tensor and no array can be added to; for all else that takes it, a float."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in _ADDITIONS:
            raise RuntimeError(_NO_FUSION)
        args = [float(value) if isinstance(value, cls) else value for value in args]
        kwargs = {
            key: float(value) if isinstance(value, cls) else value
            for key, value in (kwargs or {}).items()
        }
        return function(*args, **kwargs)

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        """NumPy asks it: exporters fuse in arrays."""
        if ufunc.__name__ == 'add':
            raise RuntimeError(_NO_FUSION)
        inputs = [float(value) if isinstance(value, _Eps) else value for value in inputs]
        return getattr(ufunc, method)(*inputs, **kwargs)

    def __reduce__(self):
        return float, (float(self),)


_NO_FUSION = (
    'a norm layer of mmubn cannot be fused into a convolution as BatchNorm can: leave that out '
    "(fuse_conv_bn, efficient_conv_bn_eval, fuse of ultralytics' models) and fold by "
    "mmubn.prepare_for_inference(model), or go back by mmubn.convert_norm(model, dict(type='BN')) "
    'where that is exact. For anything but fusing, add float(layer.eps)'
)
_ADDITIONS = (torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__)


def _refuse_replacement(module: nn.Module, name: str, value: Optional[Tensor]) -> None:
    """Raises where another norm layer takes a second tensor of a rectified one."""
    kind = type(module).__name__
    if isinstance(module, BatchNormGuard) or not ('Norm' in kind or 'BN' in kind):
        return
    held = _tensors(module)
    if not held:
        return
    # Of references, which is one operation: other threads may be building layers.
    for reference in list(_layers.data):
        layer = reference()
        own = {} if layer is None else _tensors(layer)
        # One tensor that two layers share is no replacement yet.
        if own.get(name) is value is not None and any(held.get(n) is own[n] for n in own):
            raise RuntimeError(
                f'{type(layer).__name__} cannot become {kind}: its rectifications would be lost. '
                'Leave sync_bn unset, give RTMDet use_syncbn=False, and call no converter '
                '(convert_sync_batchnorm, convert_splitbn_model) on a model that has this layer. '
                "For statistics over all processes use norm_cfg=dict(type='SyncUBN'), or turn the "
                "UBN of a model into it by mmubn.convert_norm(model, dict(type='SyncUBN'))."
            )


def _tensors(module: nn.Module) -> Dict[str, Tensor]:
    """Its parameters and buffers; none of a layer that is being built."""
    groups = (module.__dict__.get(group, {}) for group in ('_parameters', '_buffers'))
    return {n: value for group in groups for n, value in list(group.items()) if value is not None}


# torch calls them for each tensor that a module takes, in a constructor or by assignment.
register_module_parameter_registration_hook(_refuse_replacement)
register_module_buffer_registration_hook(_refuse_replacement)


def callers() -> Iterator[FrameType]:
    """The frames on the stack, the innermost first."""
    frame = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back

"""Gives ``sync_bn`` of a config its meaning for UBN."""

from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers import SYNCHRONISED
from ..layers.base import RectifiedBatchNorm
from .errors import CommandError
from .lookup import find_class
from .norm_check import norm_cfgs

_BATCH_NORMS = dict(torch='SyncBN', mmcv='MMSyncBN')


def replace_sync_bn(cfg: Config) -> None:
    """Names synchronised layers in the ``norm_cfg`` of a model with UBN, in place of ``sync_bn``.

    mmengine's ``sync_bn`` rebuilds every layer as SyncBatchNorm, which ours refuse. UBN
    becomes SyncUBN, BN beside it SyncBN or, for ``'mmcv'``, MMSyncBN. A config without
    a layer of ours is left to mmengine.

    Args:
        cfg (Config): Changed in place; its default scope must be in force.

    Raises:
        CommandError: A layer that has no synchronised version, or an unknown ``sync_bn``.
    """
    kind = cfg.get('sync_bn')
    norms = [(path, norm, find_class(norm, MODELS)) for path, norm in norm_cfgs(cfg)]
    norms = [entry for entry in norms if isinstance(entry[2], type)]
    if kind is None or not any(issubclass(layer, RectifiedBatchNorm) for *_, layer in norms):
        return
    if kind not in _BATCH_NORMS:
        raise CommandError(f"sync_bn must be 'torch' or 'mmcv', got {kind!r}")
    for path, norm, layer in norms:
        if layer in SYNCHRONISED:
            norm['type'] = SYNCHRONISED[layer].__name__
        elif issubclass(layer, RectifiedBatchNorm):
            if layer not in SYNCHRONISED.values():
                raise CommandError(
                    f'{path}: there is no synchronised {layer.__name__}; remove sync_bn={kind!r}'
                )
        elif issubclass(layer, _BatchNorm) and not issubclass(layer, nn.SyncBatchNorm):
            norm['type'] = _BATCH_NORMS[kind]
    cfg.sync_bn = None

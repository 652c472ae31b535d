"""sync_bn of a config."""

import pytest
from mmengine.config import Config
from mmengine.registry import MODELS

from mmubn.cli.errors import CommandError
from mmubn.cli.sync_bn import replace_sync_bn
from mmubn.layers import UBN, SyncUBN

pytest.importorskip('mmpretrain')
SCOPE = 'mmpretrain'


def config(sync_bn, *norms):
    necks = [dict(type='GlobalAveragePooling', norm_cfg=dict(type=norm)) for norm in norms[1:]]
    backbone = dict(type='ResNet', depth=18, norm_cfg=dict(type=norms[0], eps=1e-3))
    return Config(dict(model=dict(backbone=backbone, necks=necks), sync_bn=sync_bn))


def types(cfg):
    return [n.norm_cfg.type for n in (cfg.model.backbone, *cfg.model.necks)]


@pytest.mark.parametrize(('sync_bn', 'batch_norm'), [('torch', 'SyncBN'), ('mmcv', 'MMSyncBN')])
def test_ubn_becomes_sync_ubn_and_bn_what_sync_bn_says(sync_bn, batch_norm):
    cfg = config(sync_bn, 'UBN', 'BN', 'SyncUBN', 'GN', 'BN2d')
    replace_sync_bn(cfg)
    assert types(cfg) == ['SyncUBN', batch_norm, 'SyncUBN', 'GN', batch_norm]
    assert cfg.sync_bn is None
    layers = [m for m in MODELS.build(cfg.model.backbone).modules() if isinstance(m, UBN)]
    assert {type(m) for m in layers} == {SyncUBN}
    assert layers[0].eps == 1e-3


@pytest.mark.parametrize(('sync_bn', 'norms'), [('torch', ['BN']), (None, ['UBN', 'BN'])])
def test_other_configs_are_left_alone(sync_bn, norms):
    cfg = config(sync_bn, *norms)
    replace_sync_bn(cfg)
    assert (cfg.sync_bn, types(cfg)) == (sync_bn, norms)


def test_what_cannot_be_synchronised_is_one_line():
    expected = r'model.necks.0.norm_cfg: there is no synchronised RBN; remove sync_bn=.torch.'
    with pytest.raises(CommandError, match=expected):
        replace_sync_bn(config('torch', 'UBN', 'RBN'))
    with pytest.raises(CommandError, match="sync_bn must be 'torch' or 'mmcv', got True"):
        replace_sync_bn(config(True, 'UBN'))

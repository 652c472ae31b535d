"""sync_bn of a config, and the converters of torch and mmengine."""

import pytest
import torch
from mmengine.config import Config
from mmengine.model import convert_sync_batchnorm, revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mmubn.cli.errors import CommandError
from mmubn.cli.sync_bn import replace_sync_bn
from mmubn.layers import RBN, UBN, SyncUBN

pytest.importorskip('mmpretrain')


def config(sync_bn, *norms):
    necks = [dict(type='GlobalAveragePooling', norm_cfg=dict(type=norm)) for norm in norms[1:]]
    backbone = dict(type='ResNet', depth=18, norm_cfg=dict(type=norms[0], eps=1e-3))
    cfg = Config(dict(model=dict(backbone=backbone, necks=necks), sync_bn=sync_bn))
    init_default_scope('mmpretrain')
    return cfg


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


@pytest.mark.parametrize('layer', [UBN, SyncUBN, RBN])
def test_the_converters_refuse_and_name_the_way(layer):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), layer(4))
    for convert in (nn.SyncBatchNorm.convert_sync_batchnorm, convert_sync_batchnorm):
        with pytest.raises(RuntimeError) as caught:
            convert(model)
        assert f'{layer.__name__} cannot become SyncBatchNorm' in str(caught.value)
        assert "mmubn.convert_norm(model, dict(type='SyncUBN'))" in str(caught.value)
        assert "norm_cfg=dict(type='SyncUBN')" in str(caught.value)


def test_revert_sync_batchnorm_leaves_sync_ubn_which_is_ubn_on_one_process():
    model = nn.Sequential(SyncUBN(3), nn.SyncBatchNorm(3))
    reverted = revert_sync_batchnorm(model)
    assert type(reverted[0]) is SyncUBN
    assert not isinstance(reverted[1], nn.SyncBatchNorm)
    x = torch.randn(4, 3, 5, 5)
    assert torch.equal(reverted[0](x), UBN(3)(x))

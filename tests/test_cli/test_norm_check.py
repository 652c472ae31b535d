"""The check of norm_cfg, wherever in the model it stands."""

import pytest
from mmengine.config import Config

pytest.importorskip('mmcv')

from mmubn.cli.errors import CommandError
from mmubn.cli.norm_check import check_norms

SCOPE = 'mmengine'


def config(norm, **others) -> Config:
    head = dict(bbox_head=[dict(conv_norm_cfg=norm), dict(norm_cfg=None)])
    return Config(dict(model=dict(type='Any', head=head, norm_cfg=dict(type='BN')), **others))


@pytest.mark.parametrize(
    'norm',
    [
        dict(type='UBN', fct=None, requires_grad=False),
        dict(type='RBN'),
        dict(type='BN', eps=1e-3, momentum=0.01),
        dict(type='SyncBN'),
        dict(type='GN', num_groups=32),
        dict(type='LN', eps=1e-6),
    ],
)
def test_sound_norms_pass(norm):
    check_norms(config(norm))


@pytest.mark.parametrize(
    ('norm', 'reason'),
    [
        (dict(type='UBN', cente=False), "unknown key 'cente', did you mean 'center'"),
        (dict(type='UBN', fct=2), r'fct is a cosine similarity in \[-1, 1\]'),
        (dict(type='BN', fct=0.15), "unexpected keyword argument 'fct'"),
        (dict(type='Nothing12'), "no norm layer is registered as 'Nothing12'"),
        (dict(type='GN'), 'num_groups is left out; GN needs it'),
        (dict(type='UBN', requires_grad='maybe'), 'requires_grad'),
        (dict(type='BN', requires_grad='maybe'), 'requires_grad'),
        (dict(type='SyncBNN'), "did you mean 'SyncBN'"),
        (dict(type='UBNSync2d'), "did you mean 'SyncUBN'?"),
        (dict(type='SyncRBN'), "no synchronised RBN: type='RBN' has each process's own"),
        (dict(type='UnifiedUBN2d'), "did you mean 'UBN'"),
        (dict(type='iebn'), "did you mean 'IEBN'"),
    ],
)
def test_error_names_the_place(norm, reason):
    place = r'^model\.head\.bbox_head\.0\.conv_norm_cfg: .*'
    with pytest.raises(CommandError, match=place + reason):
        check_norms(config(norm))

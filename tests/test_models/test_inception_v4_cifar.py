"""Inception-v4 for 32x32: timm's weights, the known size, and one norm throughout."""

import pytest
import torch
from mmengine.registry import MODELS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmubn import UBN

pytest.importorskip('mmpretrain')
CLASSIFIER = 1536 * 100 + 100


def build(**settings) -> nn.Module:
    return MODELS.build(dict(type='InceptionV4_CIFAR', **settings))


def convolutions(model: nn.Module) -> list:
    """Sizes of all kernels, those of (1, n) turned to (n, 1), as their order is free."""
    sizes = [m.weight.shape for m in model.modules() if isinstance(m, nn.Conv2d)]
    return sorted((out, inp, *sorted(kernel)) for out, inp, *kernel in sizes)


def test_has_the_known_number_of_parameters():
    number = sum(p.numel() for p in build().parameters()) + CLASSIFIER
    assert number == 41_296_516  # "41.3M" in its source


def test_has_the_convolutions_of_timms():
    timm = pytest.importorskip('timm')
    theirs = timm.create_model('inception_v4', pretrained=False, num_classes=0)
    assert convolutions(build()) == convolutions(theirs)


def test_ends_at_7x7():
    model = build()
    model.eval()
    seen = []
    for stage in (model.stem, model.reduction_a, model.reduction_b):
        stage.register_forward_hook(lambda module, x, y: seen.append(tuple(y.shape)))
    (y,) = model(torch.randn(1, 3, 32, 32))
    assert seen == [(1, 384, 30, 30), (1, 1024, 14, 14), (1, 1536, 7, 7)]
    assert y.shape == (1, 1536, 7, 7)


def test_every_norm_is_that_of_norm_cfg():
    norms = [m for m in build(norm_cfg=dict(type='UBN', fct=0.2)).modules()]
    norms = [m for m in norms if isinstance(m, _BatchNorm)]
    assert len(norms) == 149
    assert {type(norm) for norm in norms} == {UBN}
    assert {norm.fct for norm in norms} == {0.2}


def test_dropout_takes_whole_channels_in_training_alone():
    dropout = build().dropout
    x = torch.ones(4, 1536, 2, 2)
    kept = dropout(x)
    assert set(kept.unique().tolist()) == {0, 1.25}
    assert torch.equal(kept, kept[..., :1, :1].expand_as(kept))
    assert 0.75 < (kept > 0).float().mean() < 0.85
    assert torch.equal(dropout.eval()(x), x)

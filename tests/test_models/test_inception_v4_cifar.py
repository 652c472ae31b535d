"""Inception-v4 for 32x32: timm's weights, resolutions and dropout."""

import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

pytest.importorskip('mmpretrain')


def build(**settings) -> nn.Module:
    return MODELS.build(dict(type='InceptionV4_CIFAR', **settings))


def convolutions(model: nn.Module) -> list:
    """Sizes of all kernels, those of (1, n) turned to (n, 1), as their order is free."""
    sizes = [m.weight.shape for m in model.modules() if isinstance(m, nn.Conv2d)]
    return sorted((out, inp, *sorted(kernel)) for out, inp, *kernel in sizes)


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


def test_dropout_takes_whole_channels_in_training_alone():
    dropout = build().dropout
    x = torch.ones(4, 1536, 2, 2)
    kept = dropout(x)
    assert set(kept.unique().tolist()) == {0, 1.25}
    assert torch.equal(kept, kept[..., :1, :1].expand_as(kept))
    assert 0.75 < (kept > 0).float().mean() < 0.85
    assert torch.equal(dropout.eval()(x), x)

"""ResNeXt for 32x32: the groups and the resolutions."""

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from torch import nn

pytest.importorskip('mmpretrain')


def build(**settings) -> nn.Module:
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        return MODELS.build(dict(type='ResNeXt_CIFAR', depth=50, **settings))


def test_differs_from_mmpretrains_in_stem_and_grouping():
    from mmpretrain.models import ResNeXt

    ours, theirs = build(), ResNeXt(depth=50)
    sizes = {name: p.shape for name, p in theirs.named_parameters()}
    changed = {name for name, p in ours.named_parameters() if p.shape != sizes[name]}
    assert sizes.keys() == {name for name, _ in ours.named_parameters()}
    convs = {f'layer{i + 1}.{j}.conv1.weight' for i, n in enumerate((3, 4, 6, 3)) for j in range(n)}
    assert changed == {'conv1.weight', *convs}
    for name in convs:
        assert ours.get_parameter(name).shape[1] * 32 == sizes[name][1]


def test_keeps_the_resolution_up_to_the_second_stage():
    model = build(out_indices=(0, 1, 2, 3))
    model.eval()
    shapes = [tuple(y.shape) for y in model(torch.randn(1, 3, 32, 32))]
    assert shapes == [(1, 256, 32, 32), (1, 512, 16, 16), (1, 1024, 8, 8), (1, 2048, 4, 4)]

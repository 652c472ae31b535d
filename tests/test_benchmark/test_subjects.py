"""The norms and models that are measured."""

import pytest
import torch
from torch import nn

from mmubn import layers
from mmubn.benchmark.subjects import NORMS, make_model, with_norm


def test_every_layer_of_one_process_is_a_norm():
    measured = {cfg['type'] for cfg in NORMS.values() if cfg is not None}
    assert measured == {name for name in layers.__all__ if name != 'SyncUBN'}


def test_literal_is_the_layer():
    literal = with_norm(nn.BatchNorm2d(3), 'literal')
    layer = with_norm(nn.BatchNorm2d(3), 'ubn')
    for _ in range(2):
        x = torch.randn(4, 3, 5, 5)
        torch.testing.assert_close(literal(x), layer(x))
    for (name, value), other in zip(layer.named_buffers(), literal.buffers()):
        torch.testing.assert_close(other, value, msg=name)
    assert literal(x.bfloat16()).dtype == torch.bfloat16


def test_norms_of_a_model():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4)))
    model = with_norm(model, 'literal')
    assert [type(m).__name__ for m in model.modules()] == [
        *('Sequential', 'Conv2d', 'Sequential', 'Literal', 'UBN')
    ]


def test_steps_of_a_model_all_do_the_same_work():
    """The learning rate is 0, and what Mask R-CNN samples is the same for every norm."""
    sizes = (1, 3, 96, 96), torch.device('cpu'), torch.contiguous_format
    losses = []
    for kind in ('bn', 'ubn'):
        model, loss = make_model('mask_rcnn_r50', *sizes)
        model.rpn._post_nms_top_n = {'training': 16, 'testing': 16}
        model = with_norm(model, kind)
        losses += [loss(model).item() for _ in range(2)]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-3)

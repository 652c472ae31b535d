"""What the layers keep for the backward pass."""

import itertools

import pytest
import torch
import torchvision
from torch import nn

import mmubn
from mmubn.benchmark import measure

LAYOUTS = [torch.contiguous_format, torch.channels_last]
LARGE = [(32, 64, 56, 56), (32, 256, 14, 14), (128, 64, 32, 32), (2, 256, 100, 152)]
SMALL = [(32, 512, 7, 7), (64, 128, 3, 5)]  # planes for which a float32 each would weigh


def kept(shape, dtype, layout):
    """Bytes of a BatchNorm and of the UBN made from it."""
    x = torch.empty(shape, dtype=dtype, memory_format=layout).normal_().requires_grad_()
    bn = nn.BatchNorm2d(shape[1])
    ubn = mmubn.UBN(shape[1], fct=0.15)
    bytes_bn, bytes_ubn = (measure.saved_bytes(lambda m=m: m(x), m) for m in (bn, ubn))
    assert bytes_bn >= x.numel() * x.element_size()
    return bytes_bn, bytes_ubn


@pytest.mark.parametrize(
    ('shape', 'layout', 'dtype'),
    [
        *((shape, LAYOUTS[0], torch.float32) for shape in LARGE),
        *((shape, LAYOUTS[1], torch.bfloat16) for shape in LARGE),
        *itertools.product(SMALL, LAYOUTS, [torch.float32, torch.bfloat16]),
    ],
)
def test_a_layer_keeps_what_batch_norm_keeps(shape, layout, dtype):
    bytes_bn, bytes_ubn = kept(shape, dtype, layout)
    assert bytes_ubn <= 1.03 * bytes_bn


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('shape', [(8, 64, 7, 7), (4, 3, 5, 9), (4, 8, 1, 1)])
def test_small_batches_add_taps_and_vectors_alone(shape, layout, dtype):
    """Few numbers a channel, whatever N: that is more than 3 % where the whole input is small."""
    bytes_bn, bytes_ubn = kept(shape, dtype, layout)
    assert bytes_ubn - bytes_bn <= 4 * (9 + 8) * shape[1]


def ratio(make_model, loss):
    model = make_model()
    bytes_bn = measure.saved_bytes(lambda: loss(model), model)
    mmubn.convert_norm(model, dict(type='UBN', fct=0.15))
    return measure.saved_bytes(lambda: loss(model), model) / bytes_bn


@pytest.mark.newer_torch('hooks of saved tensors are traced there', than='2.4')
@pytest.mark.filterwarnings('ignore')
def test_a_compiled_network_keeps_what_a_compiled_batch_norm_keeps():
    """With the partition that Inductor takes, which decides what is saved and what is made anew."""
    x = torch.randn(4, 8, 24, 24, requires_grad=True)

    def kept(norm):
        torch._dynamo.reset()
        net = nn.Sequential(nn.Conv2d(8, 16, 3), norm, nn.ReLU(), nn.Conv2d(16, 8, 3))
        compiled = torch.compile(net, backend='aot_eager_decomp_partition')
        return measure.saved_bytes(lambda: compiled(x), net)

    assert kept(mmubn.UBN(16)) <= 1.1 * kept(nn.BatchNorm2d(16))


def test_resnet50_keeps_what_batch_norm_keeps():
    images = torch.randn(2, 3, 160, 160)
    found = ratio(torchvision.models.resnet50, lambda model: model(images).sum())
    assert found <= 1.05


def test_mask_rcnn_keeps_what_batch_norm_keeps():
    """Inputs are small beside training's 800 x 1333, which weighs O(N C) numbers more."""

    def make_model():
        return torchvision.models.detection.maskrcnn_resnet50_fpn(
            weights=None,
            weights_backbone=None,
            min_size=256,
            max_size=384,
            # Few proposals: the heads have no norm layer, and what they keep counts for both.
            rpn_post_nms_top_n_train=64,
            box_batch_size_per_image=16,
        ).train()

    images = list(torch.rand(2, 3, 256, 384))
    boxes = torch.tensor([[20.0, 30.0, 150.0, 200.0], [180.0, 50.0, 330.0, 230.0]])
    masks = torch.ones(2, 256, 384, dtype=torch.uint8)
    target = dict(boxes=boxes, labels=torch.tensor([1, 2]), masks=masks)

    def loss(model):
        torch.manual_seed(0)  # the same proposals are sampled
        return sum(model(images, [target, target]).values())

    assert ratio(make_model, loss) <= 1.05

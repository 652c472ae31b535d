"""What is measured: norm layers by name, the literal composition, whole models."""

from typing import Callable, Dict, Iterator, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import layers
from ..cli.errors import CommandError
from ..convert import convert_norm
from ..layers import UBN
from ..ops import BACKENDS, reference

# Every layer of ours that one process can train, by its type in lower case.
KINDS = {name.lower(): name for name in layers.__all__ if not name.startswith('Sync')}
# The gate works in every step and stays open, so that each norm does all of its work in all
# of them.
_UBN = dict(type='UBN', fct=0.15, fct_warmup=10**9)
NORMS: Dict[str, Optional[dict]] = {
    'bn': None,
    'bn_compiled': None,
    'ubn': _UBN,
    'ubn_no_gate': dict(type='UBN', fct=None),
    **{f'ubn_{name}': dict(_UBN, backend=name) for name in BACKENDS if name != 'auto'},
    'ubn_compiled': _UBN,
    'literal': _UBN,
    **{kind: dict(type=name) for kind, name in KINDS.items() if kind != 'ubn'},
}
MODELS = ('resnet50', 'resnet18_small', 'mask_rcnn_r50')


class Literal(nn.Module):
    """The equations as they stand, in the input's dtype throughout: autograd keeps it all.

    Args:
        layer (UBN): Owns the settings, parameters and buffers.
    """

    def __init__(self, layer: UBN) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        buffers = dict(layer.named_buffers())
        y, moved = reference.ubn_step(
            x,
            {name: value.to(x.dtype) for name, value in layer.named_parameters()},
            buffers,
            training=layer.training,
            fct=layer.fct,
            fct_momentum=layer.fct_momentum,
            fct_warmup=layer.fct_warmup,
            momentum=layer.momentum,
            eps=float(layer.eps),
        )
        with torch.no_grad():
            for name, value in moved.items():
                buffers[name].copy_(value)
        return y


def with_norm(model: nn.Module, name: str) -> nn.Module:
    """``model`` with its BatchNorm layers, or the layer that it is, replaced by a norm."""
    if NORMS[name] is not None:
        model = convert_norm(model, NORMS[name])
    if name.endswith('_compiled'):
        torch._dynamo.reset()  # each shape anew, not as one more variant of a dynamic one
        return torch.compile(model, dynamic=False)
    if name == 'literal':
        if isinstance(model, UBN):
            return Literal(model)
        for parent in list(model.modules()):
            for child_name, child in list(parent.named_children()):
                if isinstance(child, UBN):
                    setattr(parent, child_name, Literal(child))
    return model


def layer_step(norm: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], Iterator[str]]:
    """Forward and backward of a layer, for the upstream gradient ``dy``."""
    inputs = [x, *norm.parameters()]

    def step() -> Iterator[str]:
        y = norm(x)
        yield 'forward'
        torch.autograd.grad(y, inputs, dy)
        yield 'backward'

    return step


def make_model(
    kind: str, shape: Tuple[int, ...], device: torch.device, layout: torch.memory_format
) -> Tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """A torchvision model with BatchNorm, and what gives the loss of such a model.

    Args:
        kind (str): One of ``MODELS``.
        shape (tuple): Of the images, (N, 3, H, W).
        device (torch.device): The device.
        layout (torch.memory_format): Of weights and images.

    Returns:
        tuple: The model, in training mode, and a function from a model to its loss on
        one fixed batch of random images and targets.

    Raises:
        CommandError: There is no torchvision.
    """
    try:
        from torchvision import models
    except ImportError as error:
        raise CommandError(f'--model {kind} needs torchvision: {error}') from error
    batch, _, height, width = shape
    torch.manual_seed(0)
    images = torch.rand(shape).to(device, memory_format=layout)
    if kind != 'mask_rcnn_r50':
        model = models.resnet50(weights=None) if kind == 'resnet50' else _resnet18_small(models)
        labels = torch.randint(10, (batch,)).to(device)

        def loss(net: nn.Module) -> Tensor:
            return F.cross_entropy(net(images), labels)
    else:
        model = models.detection.maskrcnn_resnet50_fpn(
            weights=None,
            weights_backbone=None,
            min_size=min(height, width),
            max_size=max(height, width),
        )
        targets = [_objects(height, width, device) for _ in range(batch)]

        def loss(net: nn.Module) -> Tensor:
            torch.manual_seed(0)  # the same proposals for all
            return sum(net(list(images), targets).values())

    return model.to(device, memory_format=layout).train(), loss


def _resnet18_small(models) -> nn.Module:
    """The network of configs/cifar10/resnet18_small_cifar10.py: 16 channels, no early strides."""
    net = models.resnet18(weights=None, num_classes=10)
    net.maxpool = nn.Identity()
    net.conv1 = nn.Conv2d(3, 64, 3, padding=1)
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.BatchNorm2d(child.num_features // 4))
            elif isinstance(child, nn.Conv2d):
                inputs = 3 if child is net.conv1 else child.in_channels // 4
                rest = child.kernel_size, child.stride, child.padding
                setattr(module, name, nn.Conv2d(inputs, child.out_channels // 4, *rest, bias=False))
    net.fc = nn.Linear(128, 10)
    return net


def _objects(height: int, width: int, device: torch.device, count: int = 8) -> Dict[str, Tensor]:
    """Random boxes of a quarter to a half of the image's sides, their masks all of the box."""
    size = torch.tensor([width, height])
    sides = size * (0.25 + 0.25 * torch.rand(count, 2))
    corner = (size - sides) * torch.rand(count, 2)
    boxes = torch.cat([corner, corner + sides], dim=1)
    masks = torch.zeros(count, height, width, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.round().int().tolist()):
        mask[top:bottom, left:right] = 1
    labels = torch.randint(1, 91, (count,))
    return {
        key: value.to(device)
        for key, value in dict(boxes=boxes, labels=labels, masks=masks).items()
    }


def model_step(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], Iterator[str]]:
    """Forward, backward and update by SGD of a model.

    The learning rate is 0, which costs the same: all steps of all norms do the work of
    the first, whatever the norm makes of training.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, weight_decay=1e-4)

    def step() -> Iterator[str]:
        value = loss()
        yield 'forward'
        value.backward()
        yield 'backward'
        optimizer.step()
        optimizer.zero_grad()
        yield 'update'

    return step

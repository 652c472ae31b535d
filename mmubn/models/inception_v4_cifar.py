"""Inception-v4 for 32x32 images."""

from functools import partial
from typing import Callable, Optional, Tuple

import torch
from mmcv.cnn import ConvModule
from mmengine.model import ModuleList
from mmpretrain.models.backbones.base_backbone import BaseBackbone
from torch import Tensor, nn


class InceptionV4_CIFAR(BaseBackbone):
    """Inception-v4 with a stem of stride 1, so that 32x32 images end at 7x7.

    41,296,516 parameters with BN and a linear classifier of 100 classes; 149 norm
    layers, one behind each convolution. The dropout of a fifth of the channels, which
    the network has between its pooling and its classifier, is the last thing here: whole
    channels are dropped, so a pooling that follows sees the same.

    Args:
        norm_cfg (dict): Of every norm layer. Default: ``dict(type='BN')``.
        init_cfg (dict, optional): As in mmengine. Default: None, ConvModule's own.

    Shape:
        - Input: (N, 3, 32, 32).
        - Output: a tuple of one, (N, 1536, 7, 7).

    Source: arXiv 1602.07261, figures 3 to 9; strides and paddings for 32x32 from
    weiaicunzai/pytorch-cifar100.
    """

    def __init__(self, norm_cfg: Optional[dict] = None, init_cfg: Optional[dict] = None) -> None:
        super().__init__(init_cfg)
        chain = partial(_chain, norm_cfg or dict(type='BN'))
        self.stem = _stem(chain)
        self.inception_a = nn.Sequential(*[_inception_a(chain) for _ in range(4)])
        self.reduction_a = _reduction_a(chain)
        self.inception_b = nn.Sequential(*[_inception_b(chain) for _ in range(7)])
        self.reduction_b = _reduction_b(chain)
        self.inception_c = nn.Sequential(*[_inception_c(chain) for _ in range(3)])
        self.dropout = nn.Dropout2d(0.2)

    def forward(self, x: Tensor) -> Tuple[Tensor]:
        """The last feature map, (N, 1536, 7, 7), in a tuple."""
        x = self.inception_a(self.stem(x))
        x = self.inception_b(self.reduction_a(x))
        x = self.inception_c(self.reduction_b(x))
        return (self.dropout(x),)


Chain = Callable[..., nn.Sequential]


class _Branches(ModuleList):
    """Modules with the same input, their outputs side by side."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self], 1)


def _chain(norm_cfg: dict, channels: int, *convs: tuple) -> nn.Sequential:
    """Convolution, norm and ReLU, in turn.

    Each of ``convs`` is (channels, kernel size), with stride 1 and padding that keeps the
    size, or (channels, kernel size, stride, padding).
    """
    layers = []
    for out_channels, kernel, *stride_and_padding in convs:
        height, width = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        stride, padding = stride_and_padding or (1, (height // 2, width // 2))
        layers.append(
            ConvModule(channels, out_channels, (height, width), stride, padding, norm_cfg=norm_cfg)
        )
        channels = out_channels
    return nn.Sequential(*layers)


def _averaged(channels: int, chain: Chain, out_channels: int) -> nn.Sequential:
    return nn.Sequential(nn.AvgPool2d(3, 1, 1), chain(channels, (out_channels, 1)))


def _stem(chain: Chain) -> nn.Sequential:
    return nn.Sequential(
        chain(3, (32, 3, 1, 0), (32, 3), (64, 3)),
        _Branches(chain(64, (96, 3)), nn.MaxPool2d(3, 1, 1)),
        _Branches(
            chain(160, (64, 1), (64, (7, 1)), (64, (1, 7)), (96, 3)),
            chain(160, (64, 1), (96, 3)),
        ),
        _Branches(nn.MaxPool2d(3, 1, 1), chain(192, (192, 3))),
    )


def _inception_a(chain: Chain) -> _Branches:
    return _Branches(
        chain(384, (64, 1), (96, 3), (96, 3)),
        chain(384, (64, 1), (96, 3)),
        chain(384, (96, 1)),
        _averaged(384, chain, 96),
    )


def _reduction_a(chain: Chain) -> _Branches:
    return _Branches(
        chain(384, (192, 1), (224, 3), (256, 3, 2, 0)),
        chain(384, (384, 3, 2, 0)),
        nn.MaxPool2d(3, 2),
    )


def _inception_b(chain: Chain) -> _Branches:
    return _Branches(
        chain(1024, (384, 1)),
        chain(1024, (192, 1), (224, (1, 7)), (256, (7, 1))),
        chain(1024, (192, 1), (192, (1, 7)), (224, (7, 1)), (224, (1, 7)), (256, (7, 1))),
        _averaged(1024, chain, 128),
    )


def _reduction_b(chain: Chain) -> _Branches:
    return _Branches(
        chain(1024, (192, 1), (192, 3, 2, 1)),
        chain(1024, (256, 1), (256, (1, 7)), (320, (7, 1)), (320, 3, 2, 1)),
        nn.MaxPool2d(3, 2, 1),
    )


def _inception_c(chain: Chain) -> _Branches:
    return _Branches(
        chain(1536, (256, 1)),
        nn.Sequential(
            chain(1536, (384, 1)), _Branches(chain(384, (256, (3, 1))), chain(384, (256, (1, 3))))
        ),
        nn.Sequential(
            chain(1536, (384, 1), (448, (1, 3)), (512, (3, 1))),
            _Branches(chain(512, (256, (1, 3))), chain(512, (256, (3, 1)))),
        ),
        _averaged(1536, chain, 256),
    )

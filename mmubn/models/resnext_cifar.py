"""ResNeXt for 32x32 images."""

from mmcv.cnn import build_conv_layer
from mmpretrain.models import ResNet_CIFAR, ResNeXt
from mmpretrain.models.backbones.resnext import Bottleneck


class GroupedBottleneck(Bottleneck):
    """ResNeXt's block with the first 1x1 convolution in groups, as the second is.

    The published block groups the 3x3 convolution alone; the CIFAR variant groups both.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.conv1 = build_conv_layer(
            self.conv_cfg,
            self.in_channels,
            self.mid_channels,
            kernel_size=1,
            stride=self.conv1_stride,
            groups=self.groups,
            bias=False,
        )


class ResNeXt_CIFAR(ResNet_CIFAR, ResNeXt):
    """ResNeXt with a 3x3 stem of stride 1 and no pooling after it.

    14,788,772 parameters at depth 50 with BN and a linear classifier of 100 classes. The
    arguments are those of mmpretrain's ``ResNeXt``; ``norm_cfg`` holds for every norm.

    Shape:
        - Input: (N, 3, 32, 32).
        - Output: a tuple of one, (N, 2048, 4, 4).

    Source: arXiv 1611.05431 for the network; weiaicunzai/pytorch-cifar100 for the stem
    and the grouped 1x1 convolution, without which there are 23.2 million parameters.
    """

    arch_settings = {
        depth: (GroupedBottleneck, blocks) for depth, (_, blocks) in ResNeXt.arch_settings.items()
    }

"""Batch Normalization with Enhanced Linear Transformation, a baseline of the UBN paper."""

import math
from typing import Optional

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .base import RectifiedBatchNorm


class BNET(RectifiedBatchNorm, _BatchNorm):
    r"""BatchNorm whose affine is a depthwise convolution.

    .. math::
        Y = \mathrm{dwconv}_k\!\left(\frac{X - \mu}{\sqrt{\sigma^2 + \epsilon}};\,
            \gamma \odot K\right) + \beta

    ``kernel`` (K) and ``bias`` (:math:`\beta`) start as published, like those of a
    new ``nn.Conv2d(C, C, k, groups=C)``: uniform in [-1/k, 1/k]. ``weight``
    (:math:`\gamma`), which the publication folds into the kernel, starts at 1.

    Args:
        num_features (int): C.
        eps (float): :math:`\epsilon`. Default: 1e-5.
        momentum (float, optional): As in ``nn.BatchNorm2d``. Default: 0.1.
        affine (bool): Whether there is an affine at all. Default: True.
        track_running_stats (bool): As in ``nn.BatchNorm2d``. Default: True.
        kernel_size (int): Odd k. Default: 3.
        kernel_init (str): ``'published'``, or ``'identity'``, with which the layer starts
            as BatchNorm. Default: ``'published'``.
        backend (str): What runs a step: ``'torch'``, ``'cpp'``, ``'triton'``, or ``'auto'``:
            Triton on a GPU, compiled C++ on a CPU, and torch where these cannot serve.
            Default: ``'auto'``.
        device (torch.device, optional): As in ``nn.BatchNorm2d``.
        dtype (torch.dtype, optional): As in ``nn.BatchNorm2d``.
        bias (bool): Whether the affine has a ``bias``; by name only. Default: True.

    Shape:
        - Input: (N, C, H, W), any float dtype and memory format. Output: the same.

    Raises:
        TypeError: As in :class:`UBN`.
        RuntimeError: As in :class:`UBN`.
        ValueError: As in :class:`UBN`; an unknown ``kernel_init``.

    Source: Xu et al., "BNET: Batch Normalization with Enhanced Linear
    Transformation", TPAMI 2023, and the authors' repository yuhuixu1993/BNET.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: Optional[float] = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        kernel_size: int = 3,
        kernel_init: str = 'published',
        backend: str = 'auto',
        device=None,
        dtype=None,
        *,
        bias: bool = True,
        **unknown,
    ) -> None:
        if kernel_init not in ('published', 'identity'):
            raise ValueError(f"kernel_init must be 'published' or 'identity', got {kernel_init!r}")
        self.kernel_init = kernel_init
        self.kernel_size = kernel_size
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            backend,
            device,
            dtype,
            bias=bias,
            **unknown,
        )

    @torch.no_grad()
    def _reset_rectifications(self) -> None:
        super()._reset_rectifications()
        if self.kernel_init == 'published' and self.kernel is not None:
            nn.init.kaiming_uniform_(self.kernel, a=math.sqrt(5))
            if self.bias is not None:
                nn.init.uniform_(self.bias, -1 / self.kernel_size, 1 / self.kernel_size)

    def extra_repr(self) -> str:
        """The settings, BatchNorm's first."""
        return f'{super().extra_repr()}, kernel_init={self.kernel_init}'

"""Representative Batch Normalization, a baseline of the UBN paper."""

from torch.nn.modules.batchnorm import _BatchNorm

from .base import RectifiedBatchNorm


class RBN(RectifiedBatchNorm, _BatchNorm):
    r"""Representative Batch Normalization: BatchNorm with calibrated centering and scaling.

    .. math::
        X_c &= X + w_m \odot \mathrm{GAP}(X) \\
        X_s &= (X_c - \mu) / \sqrt{\sigma^2 + \epsilon} \\
        Y   &= \gamma \odot X_s \odot \mathrm{sigmoid}(w_v \odot \mathrm{GAP}(X_s) + w_b) + \beta

    ``center_weight`` (:math:`w_m`) and ``scale_weight`` (:math:`w_v`) start at 0,
    ``scale_bias`` (:math:`w_b`) at 1, as published. It is :class:`UBN` with
    ``fct=None, kernel_size=1``.

    Args:
        num_features (int): C.
        eps (float): :math:`\epsilon`. Default: 1e-5.
        momentum (float, optional): As in ``nn.BatchNorm2d``. Default: 0.1.
        affine (bool): As in ``nn.BatchNorm2d``. Default: True.
        track_running_stats (bool): As in ``nn.BatchNorm2d``. Default: True.
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
        ValueError: As in :class:`UBN`.

    Source: Gao et al., "Representative Batch Normalization with Feature
    Calibration", CVPR 2021, Eqs. 4 to 7.
    """

    center = True
    scale = True

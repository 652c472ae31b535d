"""Instance Enhancement Batch Normalization, a baseline of the UBN paper."""

from torch.nn.modules.batchnorm import _BatchNorm

from .base import RectifiedBatchNorm


class IEBN(RectifiedBatchNorm, _BatchNorm):
    r"""Instance Enhancement Batch Normalization: BatchNorm whose scale attends to the image.

    .. math::
        Y = \gamma \odot \mathrm{sigmoid}(w_v \odot \mathrm{GAP}(X) + w_b)
            \odot \frac{X - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta

    The sigmoid sees the input's mean, where RBN's sees that of the normalised
    features. ``scale_weight`` (:math:`w_v`) starts at 0, ``scale_bias``
    (:math:`w_b`) at -1, as published.

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

    Source: Liang et al., "Instance Enhancement Batch Normalization: an Adaptive
    Regulator of Batch Noise", AAAI 2020, and the authors' repository gbup-group/IEBN.
    """

    _initial_scale_bias = -1.0
    _scale_from_input = True
    scale = True

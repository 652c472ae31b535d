"""Unified Batch Normalization, a drop-in for ``nn.BatchNorm2d``."""

import math
import numbers
from functools import partial
from typing import Any, Dict, Optional

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from .. import ops
from .base import RectifiedBatchNorm, check_integer, recomputing

# More batches than there will be.
_FOREVER = 1 << 62


class UBN(RectifiedBatchNorm, _BatchNorm):
    r"""Unified Batch Normalization over a batch of images.

    Stage 1, the feature condensation threshold (Eq. 3), in training:

    .. math::
        s &= \operatorname{mean}_{i \ne j} \cos(\mathrm{vec} X_i, \mathrm{vec} X_j) \\
        \tau &\leftarrow (1 - \alpha) \tau + \alpha s \\
        \mu, \sigma^2 &= \begin{cases}
            \text{batch statistics} & \tau > \mathrm{FCT} \\
            \text{running statistics} & \text{otherwise} \end{cases}

    In the first case the running statistics move with ``momentum``, in the second
    they stay as they are. In evaluation the running statistics normalise and nothing
    moves.

    Stage 2, the rectifications (Eqs. 4 and 5), with GAP the mean over H and W:

    .. math::
        X_c &= X + w_m \odot \mathrm{GAP}(X) \\
        X_s &= (X_c - \mu) / \sqrt{\sigma^2 + \epsilon} \\
        X_r &= X_s \odot \mathrm{sigmoid}(w_v \odot \mathrm{GAP}(X_s) + w_b) \\
        Y   &= \mathrm{dwconv}_k(X_r;\, \gamma \odot K) + \beta

    :math:`\mu` and :math:`\sigma^2` are those of :math:`X_c`; as in BatchNorm the
    variance that normalises is biased and the running one is not. ``weight``
    (:math:`\gamma`) starts at 1, ``bias`` (:math:`\beta`) at 0, ``kernel`` (K) at the
    identity, ``center_weight`` (:math:`w_m`) and ``scale_weight`` (:math:`w_v`) at 0,
    ``scale_bias`` (:math:`w_b`) at 1. ``running_similarity`` (:math:`\tau`) starts at
    1, which means condensed; the paper gives no initial value.

    A batch whose statistics are not finite does not move the running statistics. A
    batch whose similarity is not defined does not move :math:`\tau`. An empty batch
    moves nothing. ``num_batches_tracked`` counts the batches in the running
    statistics.

    Args:
        num_features (int): C.
        eps (float): :math:`\epsilon`. Default: 1e-5.
        momentum (float, optional): Weight of the newest batch in the running
            statistics; None is the cumulative average. PreciseBN sets 1 and
            ``torch.optim.swa_utils.update_bn`` sets None, to measure the statistics of all
            batches. At both the gate stays open; at 1, :math:`\tau` does not move.
            Default: 0.1.
        affine (bool): Whether there is an affine: ``weight``, ``bias`` and, for
            ``kernel_size`` above 1, ``kernel``. Default: True.
        track_running_stats (bool): As in ``nn.BatchNorm2d``; False needs
            ``fct=None``. Default: True.
        fct (float, optional): Threshold of stage 1; None switches it off.
            Default: 0.15.
        fct_momentum (float): :math:`\alpha`, weight of the newest similarity.
            Default: 0.1.
        fct_warmup (int, optional): Number of batches that the running statistics must
            hold before they may normalise in training. This is ours, not the paper's:
            without it a layer of low similarity normalises with the initial (0, 1)
            from its first step on. None is ``ceil(10 / momentum)``, after which the
            initial values have a weight below 5e-5; 0 gives the paper's equations.
            Default: None.
        fct_interval (int): k; measures the similarity in every k-th training step only.
            Its weight is :math:`1 - (1 - \alpha)^k`, so that :math:`\tau` forgets at the
            same speed. The count starts with the layer's construction, so a resumed run
            starts it again. Default: 1.
        fct_stride (int): s; measures the similarity on every s-th row and column only.
            Default: 1.
        kernel_size (int): Odd k of the affine; 1 is BatchNorm's. Default: 3.
        center (bool): Whether to calibrate the centering with ``center_weight``.
            Default: True.
        scale (bool): Whether to calibrate the scaling with ``scale_weight`` and
            ``scale_bias``. Default: True.
        backend (str): What runs a step: ``'torch'``, ``'cpp'``, ``'triton'``, or ``'auto'``:
            Triton on a GPU, compiled C++ on a CPU, and torch where these cannot serve.
            Default: ``'auto'``.
        device (torch.device, optional): As in ``nn.BatchNorm2d``.
        dtype (torch.dtype, optional): As in ``nn.BatchNorm2d``.
        bias (bool): Whether the affine has a ``bias``; by name only. Default: True.

    Shape:
        - Input: (N, C, H, W), any float dtype and memory format; statistics are
          float32 (float64 for float64 input).
        - Output: the same.

    Raises:
        TypeError: An unknown keyword; the message has the nearest known one. A ``center``
            or ``scale`` that is no bool. An input that is not a dense float tensor, or that
            mixes dtypes with the parameters.
        RuntimeError: The input is on another device; ``backend`` cannot serve; a running
            statistic requires a gradient; a CUDA graph is captured with ``fct_interval``
            above 1.
        ValueError: A setting out of its range; an input that is not 4D or has
            another number of channels; one value per channel in training.

    With ``fct=None, kernel_size=1, center=False, scale=False`` the layer is
    ``nn.BatchNorm2d``. A state dict of BatchNorm loads by name and keeps
    BatchNorm's outputs in evaluation.

    Source: arXiv 2311.15993, sections 3.3.1 to 3.3.3. The initial values of the
    rectifications are those of RBN (CVPR 2021), the identity kernel is ours.

    Examples:
        >>> norm = UBN(64, fct=0.15)
        >>> y = norm(torch.randn(8, 64, 32, 32))
    """

    running_similarity: Optional[Tensor]

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: Optional[float] = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        fct: Optional[float] = 0.15,
        fct_momentum: float = 0.1,
        fct_warmup: Optional[int] = None,
        fct_interval: int = 1,
        fct_stride: int = 1,
        kernel_size: int = 3,
        center: bool = True,
        scale: bool = True,
        backend: str = 'auto',
        device=None,
        dtype=None,
        *,
        bias: bool = True,
        **unknown,
    ) -> None:
        self.kernel_size = kernel_size
        self.center = center
        self.scale = scale
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
        self.fct = fct
        self.fct_momentum = fct_momentum
        self.fct_warmup = fct_warmup
        self.fct_interval = fct_interval
        self.fct_stride = fct_stride
        if fct is not None and not track_running_stats:
            raise ValueError(
                'fct needs running statistics: set fct=None or track_running_stats=True'
            )
        tau = torch.ones((), device=device, dtype=dtype) if track_running_stats else None
        self.register_buffer('running_similarity', tau)
        # Neither is a buffer, which would be saved, averaged over processes and copied by EMA.
        self._gate = torch.ones((), device=device, dtype=torch.bool)
        self._steps = torch.zeros((), device='cpu', dtype=torch.long)
        # In a dict, as torch 2.4's compiler sets no attribute of a module.
        self._decided = dict(once=False)

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute; refuses a setting of the gate out of its range, as the constructor."""
        if name in _CHECKS:
            _CHECKS[name](value)
        super().__setattr__(name, value)

    def reset_running_stats(self) -> None:
        """Sets the running statistics and the running similarity to their initial values."""
        super().reset_running_stats()
        # BatchNorm's constructor comes here before the buffer exists.
        tracked = self.track_running_stats
        if tracked and getattr(self, 'running_similarity', None) is not None:
            self.running_similarity.fill_(1)

    @property
    def batch_statistics_used(self) -> Optional[Tensor]:
        """Scalar bool tensor: whether the last training step normalised with batch statistics.

        None before the first, and where stage 1 is off. Reading it on a GPU waits for
        the device.
        """
        return self._gate if self._decided['once'] else None

    def _apply(self, fn, *args, **kwargs):
        """Moves the gate's decision with the buffers."""
        super()._apply(fn, *args, **kwargs)
        if not self._gate.is_meta:  # which has no value to move; _state makes it anew
            self._gate = fn(self._gate).bool()
        return self

    def _state(self) -> ops.Buffers:
        running_mean, running_var, count, *_ = super()._state()
        tau, gate = self.running_similarity, None
        if self.training:  # which alone reads it
            if tau is not None and self._gate.device != tau.device:
                # Tensors were put in place of the buffers, as load_state_dict(assign=True) does.
                with torch.inference_mode(False):  # else it could not train later
                    self._gate = torch.ones((), dtype=torch.bool, device=tau.device)
            gate = self._gate
        # No step to count, and for torch.compile to carry along, where each one measures.
        steps = self._steps if self.fct_interval > 1 else None
        return ops.Buffers(running_mean, running_var, count, tau, gate, steps)

    def _gate_settings(self, buffers: ops.Buffers) -> Dict[str, Any]:
        # PreciseBN sets a momentum of 1 to read the statistics of single batches: there is no
        # past that a shut gate could use.
        if self.fct is None or self.momentum == 1 or buffers.running_similarity is None:
            return super()._gate_settings(buffers)
        warmup = self.fct_warmup if self.fct_warmup is None else int(self.fct_warmup)
        if self.momentum is None:
            # update_bn and stochastic weight averaging set it: the average is to be that of
            # all batches, so no gate may leave one out.
            warmup = _FOREVER
        elif warmup is None:
            warmup = math.ceil(min(10 / self.momentum, _FOREVER)) if self.momentum else 10
        again = recomputing() and self._decided['once']
        self._decided['once'] = True
        return dict(
            update=not again,
            fct=self.fct,
            similarity_weight=1 - (1 - self.fct_momentum) ** self.fct_interval,
            interval=self.fct_interval,
            stride=self.fct_stride,
            warmup=warmup,
        )

    def extra_repr(self) -> str:
        """The settings, BatchNorm's first."""
        gate = f'fct={self.fct}, fct_momentum={self.fct_momentum}, fct_warmup={self.fct_warmup}'
        if self.fct_interval > 1 or self.fct_stride > 1:
            gate += f', fct_interval={self.fct_interval}, fct_stride={self.fct_stride}'
        return f'{super().extra_repr()}, {gate}'


def _check_fct(value: Any) -> None:
    if value is not None and (not _is_number(value) or not -1 <= value <= 1):
        raise ValueError(
            f'fct is a cosine similarity in [-1, 1], or None for no gate; got {value!r}'
        )


def _check_fct_momentum(value: Any) -> None:
    if not _is_number(value) or not 0 <= value <= 1:
        raise ValueError(f'fct_momentum must lie in [0, 1], got {value!r}')


def _check_fct_warmup(value: Any) -> None:
    counts = _is_number(value) and value >= 0 and float(value).is_integer()
    if value is not None and not counts:
        raise ValueError(f'fct_warmup counts batches: 0, 1, 2, ...; got {value!r}')


def _is_number(value: Any) -> bool:
    """Whether it is a real number; a bool is none here, as center and scale take those."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


# Of the settings that are read in every step, whenever they are set.
_CHECKS = dict(
    fct=_check_fct,
    fct_momentum=_check_fct_momentum,
    fct_warmup=_check_fct_warmup,
    fct_interval=partial(check_integer, 'fct_interval'),
    fct_stride=partial(check_integer, 'fct_stride'),
)

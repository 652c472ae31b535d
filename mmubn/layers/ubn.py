"""Unified Batch Normalization, a drop-in for ``nn.BatchNorm2d``."""

import difflib
import inspect
import logging
import math
from typing import Dict, List, Optional, Tuple, Union

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import ops

logger = logging.getLogger('mmubn')


class UBN(_BatchNorm):
    r"""Unified Batch Normalization over a batch of images.

    Stage 1, the feature condensation threshold (Eq. 3), in training:

    .. math::
        s &= \operatorname{mean}_{i \ne j} \cos(\mathrm{vec} X_i, \mathrm{vec} X_j) \\
        \tau &\leftarrow (1 - \alpha) \tau + \alpha s \\
        \mu, \sigma^2 &= \begin{cases}
            \text{batch statistics} & \tau > \mathrm{FCT} \\
            \text{running statistics} & \text{otherwise} \end{cases}

    The running statistics move with ``momentum`` in the first case and are left
    alone in the second. In evaluation the running statistics normalise and nothing
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
    ``scale_bias`` (:math:`w_b`) at 1.

    A batch whose statistics are not finite leaves the running statistics alone, one
    whose similarity is not defined leaves :math:`\tau` alone, and an empty batch
    leaves everything alone. ``num_batches_tracked`` counts the batches that entered
    the running statistics.

    Args:
        num_features (int): C.
        eps (float): :math:`\epsilon`. Default: 1e-5.
        momentum (float, optional): Weight of the newest batch in the running
            statistics; None is the cumulative average. Default: 0.1.
        affine (bool): Whether there is an affine: ``weight``, ``bias`` and, for
            ``kernel_size`` above 1, ``kernel``. Default: True.
        track_running_stats (bool): As in ``nn.BatchNorm2d``; False needs
            ``fct=None``. Default: True.
        fct (float, optional): Threshold of stage 1; None switches it off.
            Default: 0.15.
        fct_momentum (float): :math:`\alpha`, weight of the newest similarity.
            Default: 0.1.
        fct_warmup (int, optional): Batches that must be in the running statistics
            before they may normalise in training. This is ours, not the paper's:
            without it a layer of low similarity normalises with the initial (0, 1)
            from its first step on. None is ``ceil(10 / momentum)``, which leaves the
            initial values a weight of 5e-5; 0 gives the paper's equations.
            Default: None.
        kernel_size (int): Odd k of the affine; 1 is BatchNorm's. Default: 3.
        center (bool): Whether to calibrate the centering with ``center_weight``.
            Default: True.
        scale (bool): Whether to calibrate the scaling with ``scale_weight`` and
            ``scale_bias``. Default: True.
        device: As in ``nn.BatchNorm2d``.
        dtype: As in ``nn.BatchNorm2d``.

    Shape:
        - Input: (N, C, H, W), any float dtype and memory format; statistics are
          float32 (float64 for float64 input).
        - Output: the same.

    Raises:
        TypeError: An unknown keyword, with the nearest known one.
        ValueError: A setting out of its range; an input that is not 4D or has
            another number of channels; one value per channel in training.

    With ``fct=None, kernel_size=1, center=False, scale=False`` the layer is
    ``nn.BatchNorm2d``. A state dict of BatchNorm loads by name and keeps
    BatchNorm's outputs in evaluation.

    Source: arXiv 2311.15993, sections 3.3.1 to 3.3.3. The initial values of the
    rectifications are those of RBN (CVPR 2021), the identity kernel is ours.

    Example:
        >>> norm = UBN(64, fct=0.15)
        >>> y = norm(torch.randn(8, 64, 32, 32))
    """

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
        kernel_size: int = 3,
        center: bool = True,
        scale: bool = True,
        device=None,
        dtype=None,
        **unknown,
    ) -> None:
        if unknown:
            raise TypeError(_unknown_keyword(type(self), next(iter(unknown))))
        _check_settings(fct, fct_momentum, fct_warmup, kernel_size, track_running_stats)
        factory = dict(device=device, dtype=dtype)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **factory)
        self.fct = fct
        self.fct_momentum = fct_momentum
        self.fct_warmup = fct_warmup
        self.kernel_size = kernel_size
        self.center = center
        self.scale = scale

        def parameter(present: bool, *shape: int) -> Optional[nn.Parameter]:
            return nn.Parameter(torch.empty(shape, **factory)) if present else None

        k, channels = kernel_size, num_features
        self.register_parameter('kernel', parameter(affine and k > 1, channels, 1, k, k))
        self.register_parameter('center_weight', parameter(center, channels))
        self.register_parameter('scale_weight', parameter(scale, channels))
        self.register_parameter('scale_bias', parameter(scale, channels))
        similarity = torch.zeros((), **factory) if track_running_stats else None
        self.register_buffer('running_similarity', similarity)
        self._from_batch: Optional[Tensor] = None
        self._reset_rectifications()

    def reset_running_stats(self) -> None:
        """Sets the running statistics and the running similarity to their initial values."""
        super().reset_running_stats()
        # BatchNorm's constructor comes here before the buffer exists.
        if getattr(self, 'running_similarity', None) is not None:
            self.running_similarity.zero_()

    def reset_parameters(self) -> None:
        """Sets every parameter and buffer to its initial value."""
        super().reset_parameters()
        if hasattr(self, 'kernel'):
            self._reset_rectifications()

    @torch.no_grad()
    def _reset_rectifications(self) -> None:
        if self.kernel is not None:
            self.kernel.zero_()
            self.kernel[..., self.kernel_size // 2, self.kernel_size // 2] = 1
        if self.center_weight is not None:
            self.center_weight.zero_()
        if self.scale_weight is not None:
            self.scale_weight.zero_()
            self.scale_bias.fill_(1)
        if self.running_similarity is not None:
            self.running_similarity.zero_()

    @property
    def batch_statistics_used(self) -> Optional[Tensor]:
        """Scalar bool tensor: whether the last training step normalised with batch statistics.

        None before the first. Reading it on a GPU waits for the device.
        """
        return self._from_batch

    def forward(self, x: Tensor) -> Tensor:
        self._check_input(x)
        if x.numel() == 0:
            return self._forward_empty(x)
        if self.training or self.running_mean is None:
            image_mean, image_var = ops.image_moments(x)
            statistics = self._training_statistics(x, image_mean, image_var)
        else:
            image_mean = ops.image_mean(x)
            statistics = self.running_mean, self.running_var, False
        return ops.ubn(
            x,
            image_mean,
            *statistics,
            taps=self._taps(),
            bias=self.bias,
            center_weight=self.center_weight,
            scale_weight=self.scale_weight,
            scale_bias=self.scale_bias,
            eps=self.eps,
        )

    @torch.no_grad()
    def _training_statistics(
        self, x: Tensor, image_mean: Tensor, image_var: Tensor
    ) -> Tuple[Tensor, Tensor, Union[bool, Tensor]]:
        """Mean and variance to normalise with, whether the batch's; moves the buffers."""
        mean, var = ops.batch_statistics(image_mean, image_var, self.center_weight)
        if self.running_mean is None:
            return mean, var, True
        if not _recomputing():
            if self.fct is not None:
                self._update_similarity(x, image_mean, image_var)
            self._from_batch = self._gate()
            self._update_running_statistics(mean, var, x.numel() // self.num_features)
        from_batch = self._from_batch
        mean = torch.where(from_batch, mean, self.running_mean.to(mean.dtype))
        var = torch.where(from_batch, var, self.running_var.to(var.dtype))
        return mean, var, from_batch

    def _update_similarity(self, x: Tensor, image_mean: Tensor, image_var: Tensor) -> None:
        if self.momentum == 1:
            return  # PreciseBN measures statistics, it does not train.
        pixels = x.shape[2] * x.shape[3]
        squared_norm = pixels * (image_var + image_mean.square()).sum(1)
        similarity = ops.mean_cosine_similarity(x, squared_norm)
        tau = self.running_similarity
        # Undefined for N = 1, NaN for a NaN image: neither may enter.
        similarity = torch.where(similarity.isfinite(), similarity.to(tau.dtype), tau)
        tau.lerp_(similarity, self.fct_momentum)

    def _gate(self) -> Tensor:
        """Scalar bool tensor: whether this step normalises with batch statistics."""
        batches = self.num_batches_tracked
        # A momentum of 1, as PreciseBN sets it, keeps nothing that a shut gate could use.
        if self.fct is None or self.momentum == 1:
            return torch.ones_like(batches, dtype=torch.bool)
        warmup = self.fct_warmup
        if warmup is None:
            warmup = math.ceil(10 / self.momentum) if self.momentum else 10
        return (self.running_similarity > self.fct) | (batches < warmup)

    def _update_running_statistics(self, mean: Tensor, var: Tensor, count: int) -> None:
        update = self._from_batch & mean.isfinite().all() & var.isfinite().all()
        self.num_batches_tracked.add_(update)
        momentum = self.momentum
        if momentum is None:  # cumulative average
            momentum = 1 / self.num_batches_tracked.clamp(min=1).to(self.running_mean.dtype)
        for running, new in (
            (self.running_mean, mean),
            (self.running_var, var * (count / (count - 1))),
        ):
            moved = torch.lerp(running, new.to(running.dtype), momentum)
            running.copy_(torch.where(update, moved, running))

    def _taps(self) -> Optional[Tensor]:
        """The effective depthwise kernel, (C, k, k)."""
        if self.weight is None:
            return None
        weight = self.weight[:, None, None]
        return weight if self.kernel is None else weight * self.kernel.squeeze(1)

    def _forward_empty(self, x: Tensor) -> Tensor:
        # DDP waits for the gradient of every parameter, so all stay in the graph.
        connected = x.new_ones(self.num_features)
        for parameter in self.parameters():
            connected = connected + parameter.reshape(self.num_features, -1).sum(1).to(x.dtype)
        return x * connected.view(1, -1, 1, 1)

    def _check_input(self, x: Tensor) -> None:
        if x.dim() != 4:
            raise ValueError(f'expected 4D input (got {x.dim()}D input)')
        if x.shape[1] != self.num_features:
            raise ValueError(
                f'expected {self.num_features} channels, got input size {tuple(x.shape)}'
            )
        if self.training and x.numel() == x.shape[1]:
            raise ValueError(
                'Expected more than 1 value per channel when training, '
                f'got input size {tuple(x.shape)}'
            )

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, *args
    ) -> None:
        names = {key[len(prefix) :] for key in state_dict if key.startswith(prefix)}
        if not names.isdisjoint(('weight', 'running_mean')) and names.isdisjoint(_OWN_NAMES):
            state_dict = {**state_dict, **self._complete_batch_norm(state_dict, prefix)}
            _announce_batch_norm(prefix[:-1], missing_keys)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, *args
        )

    @torch.no_grad()
    def _complete_batch_norm(self, state_dict: Dict[str, Tensor], prefix: str) -> Dict[str, Tensor]:
        """What a BatchNorm's state dict lacks, such that evaluation gives BatchNorm's output."""
        self._reset_rectifications()
        own = {name: getattr(self, name) for name in _OWN_NAMES}
        if self.scale:
            weight = state_dict.get(prefix + 'weight')
            if weight is None:  # nothing to absorb sigmoid(1), so the factor becomes 1
                own['scale_bias'] = torch.full_like(self.scale_bias, 40.0)
            else:
                own['weight'] = (
                    weight / torch.sigmoid(self.scale_bias.to(weight.device))[: len(weight)]
                )
        return {prefix + name: value for name, value in own.items() if value is not None}

    def extra_repr(self) -> str:
        return (
            f'{super().extra_repr()}, fct={self.fct}, fct_momentum={self.fct_momentum}, '
            f'fct_warmup={self.fct_warmup}, kernel_size={self.kernel_size}, '
            f'center={self.center}, scale={self.scale}'
        )


# What a state dict of UBN may hold and one of BatchNorm never does.
_OWN_NAMES = ('kernel', 'center_weight', 'scale_weight', 'scale_bias', 'running_similarity')

# torch and mmengine hand one list of missing keys to every layer of a load, which
# tells a new load from the next layer of the same.
_announced_load: Optional[List[str]] = None


def _announce_batch_norm(layer: str, missing_keys: List[str]) -> None:
    global _announced_load
    if missing_keys is _announced_load:
        return
    _announced_load = missing_keys
    logger.warning(
        "BatchNorm checkpoint loaded into UBN layers (first: '%s'): what BatchNorm lacks starts "
        'at its initial value and weight is divided by sigmoid(scale_bias), so evaluation gives '
        "BatchNorm's outputs.",
        layer,
    )


def _check_settings(fct, fct_momentum, fct_warmup, kernel_size, track_running_stats) -> None:
    if fct is not None and not -1 <= fct <= 1:
        raise ValueError(
            f'fct is a cosine similarity in [-1, 1], or None for no stage 1; got {fct}'
        )
    if fct is not None and not track_running_stats:
        raise ValueError('fct needs running statistics: set fct=None or track_running_stats=True')
    if not 0 <= fct_momentum <= 1:
        raise ValueError(f'fct_momentum must lie in [0, 1], got {fct_momentum}')
    if fct_warmup is not None and fct_warmup < 0:
        raise ValueError(f'fct_warmup counts batches and cannot be negative, got {fct_warmup}')
    if not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f'kernel_size must be a positive odd integer, got {kernel_size}')


def _unknown_keyword(layer: type, name: str) -> str:
    known = [key for key in inspect.signature(layer).parameters if key != 'unknown']
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f", did you mean '{nearest[0]}'?" if nearest else f'; it takes {", ".join(known)}'
    return f"{layer.__name__} got an unknown key '{name}'{hint}"


def _recomputing() -> bool:
    """Whether a checkpointed segment is being run again, inside the backward pass.

    Its statistics were counted the first time and its gate has decided.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1

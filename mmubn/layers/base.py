"""What the rectified norm layers share: UBN's second stage on BatchNorm's statistics."""

import difflib
import inspect
import logging
from typing import Any, Dict, List, Optional

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import ops
from ..ops.utils import compiling
from .guards import BatchNormGuard

logger = logging.getLogger('mmubn')

# What a state dict of these layers may hold and one of BatchNorm never does.
_OWN_NAMES = ('kernel', 'center_weight', 'scale_weight', 'scale_bias', 'running_similarity')


class RectifiedBatchNorm(BatchNormGuard, _BatchNorm):
    r"""BatchNorm with calibrated centering, calibrated scaling and a convolution as affine.

    .. math::
        X_c &= X + w_m \odot \mathrm{GAP}(X) \\
        X_s &= (X_c - \mu) / \sqrt{\sigma^2 + \epsilon} \\
        X_r &= X_s \odot \mathrm{sigmoid}(w_v \odot \mathrm{GAP}(X_s) + w_b) \\
        Y   &= \mathrm{dwconv}_k(X_r;\, \gamma \odot K) + \beta

    The base of :class:`UBN`, :class:`RBN`, :class:`BNET` and :class:`IEBN`, which
    document their settings. It subclasses ``_BatchNorm``, which OpenMMLab tests for,
    and not ``nn.BatchNorm2d``, for which fusing passes look. All parameters are
    direct: a ``nn.Conv2d`` child would be taken by initialisers. Subclasses name
    ``_BatchNorm`` as a base once more, as mmengine's initialisers look no deeper.
    """

    # Initial w_b, and whether the sigmoid sees GAP(X) in place of GAP(X_s).
    _initial_scale_bias = 1.0
    _scale_from_input = False

    def __init__(
        self,
        num_features: int,
        eps: float,
        momentum: Optional[float],
        affine: bool,
        track_running_stats: bool,
        kernel_size: int,
        center: bool,
        scale: bool,
        backend: str,
        device: Any,
        dtype: Any,
        unknown: Dict[str, Any],
    ) -> None:
        if unknown:
            raise TypeError(_unknown_key_message(type(self), next(iter(unknown))))
        if not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f'kernel_size must be a positive odd integer, got {kernel_size}')
        if backend not in ops.BACKENDS:
            raise ValueError(f'backend must be one of {", ".join(ops.BACKENDS)}, got {backend!r}')
        factory = dict(device=device, dtype=dtype)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **factory)
        self.kernel_size = kernel_size
        self.center = center
        self.scale = scale
        self.backend = backend

        def register(name: str, present: bool, *shape: int) -> None:
            value = nn.Parameter(torch.empty(shape, **factory)) if present else None
            self.register_parameter(name, value)

        has_kernel = affine and kernel_size > 1
        register('kernel', has_kernel, num_features, 1, kernel_size, kernel_size)
        register('center_weight', center, num_features)
        register('scale_weight', scale, num_features)
        register('scale_bias', scale, num_features)
        self._reset_rectifications()

    def reset_parameters(self) -> None:
        """Sets every parameter and buffer to its initial value."""
        super().reset_parameters()
        if hasattr(self, 'kernel'):  # BatchNorm's constructor comes here before it exists
            self._reset_rectifications()

    @torch.no_grad()
    def _reset_rectifications(self) -> None:
        if self.kernel is not None:
            center = self.kernel_size // 2
            self.kernel.zero_()[..., center, center] = 1
        if self.center_weight is not None:
            self.center_weight.zero_()
        if self.scale_weight is not None:
            self.scale_weight.zero_()
            self.scale_bias.fill_(self._initial_scale_bias)

    def forward(self, x: Tensor) -> Tensor:
        self._check_input(x)
        if x.numel() == 0:
            return self._forward_empty(x)
        return self._step(x)

    def _step(self, x: Tensor) -> Tensor:
        parameters = ops.Parameters(
            self.weight,
            self.kernel,
            self.bias,
            self.center_weight,
            self.scale_weight,
            self.scale_bias,
        )
        return ops.ubn(
            x, parameters, self._state(), self._settings(), self._group(), backend=self.backend
        )

    def _state(self) -> ops.Buffers:
        """What a training step moves."""
        return ops.Buffers(self.running_mean, self.running_var, self.num_batches_tracked)

    def _settings(self) -> ops.Settings:
        """What this step does."""
        return ops.Settings(
            eps=self._eps,
            training=self.training or self.running_mean is None,
            momentum=self.momentum,
            update=self.running_mean is not None and not recomputing(),
            scale_from_input=self._scale_from_input,
        )

    def _group(self) -> Optional[Any]:
        """The processes whose batches are one, None where it is this one alone."""
        return None

    def _forward_empty(self, x: Tensor) -> Tensor:
        # DDP waits for the gradient of every parameter, so all stay in the graph.
        connected = x.new_ones(self.num_features)
        for parameter in self.parameters():
            # The product makes each gradient a tensor of its own: those of the sum alone
            # would be views of one, which DDP and accumulation add to in place.
            own = (0 * parameter).to(x.dtype)
            connected = connected + own.reshape(self.num_features, -1).sum(1)
        return x * connected.view(1, -1, 1, 1)

    def _check_input(self, x: Tensor) -> None:
        if isinstance(x, torch.fx.Proxy):
            raise TypeError(
                f'{type(self).__name__} cannot be traced symbolically, as efficient_conv_bn_eval '
                "does: turn that off, or make the layer a leaf of the tracer (torchvision's "
                'tracer_kwargs=dict(leaf_modules=[...]))'
            )
        if x.dim() != 4:
            raise ValueError(f'expected 4D input (got {x.dim()}D input)')
        if x.shape[1] != self.num_features:
            raise ValueError(
                f'expected {self.num_features} channels, got input size {tuple(x.shape)}'
            )
        if self.training:
            self._check_count(x)

    def _check_count(self, x: Tensor) -> None:
        if x.numel() == x.shape[1]:
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
            _announce_batch_norm(type(self).__name__, prefix[:-1], missing_keys)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, *args
        )

    @torch.no_grad()
    def _complete_batch_norm(self, state_dict: Dict[str, Tensor], prefix: str) -> Dict[str, Tensor]:
        """What a BatchNorm's state dict lacks, such that evaluation gives BatchNorm's output."""
        RectifiedBatchNorm._reset_rectifications(self)
        own = {name: getattr(self, name, None) for name in _OWN_NAMES}
        if own['running_similarity'] is not None:
            own['running_similarity'] = torch.ones_like(own['running_similarity'])
        if self.scale:
            weight = state_dict.get(prefix + 'weight')
            if weight is None:  # nothing can absorb sigmoid(w_b), so it becomes 1
                own['scale_bias'] = torch.full_like(self.scale_bias, 40.0)
            else:
                factor = torch.sigmoid(torch.tensor(self._initial_scale_bias, dtype=torch.float64))
                own['weight'] = weight / factor.item()
        return {prefix + name: value for name, value in own.items() if value is not None}

    def extra_repr(self) -> str:
        """The settings, BatchNorm's first."""
        shown = ('eps', 'momentum', 'affine', 'track_running_stats')
        shown += ('kernel_size', 'center', 'scale')
        settings = ', '.join(f'{name}={getattr(self, name)}' for name in shown)
        return f'{self.num_features}, {settings}'


def recomputing() -> bool:
    """Whether a checkpointed segment is being run again, inside the backward pass.

    Its statistics were counted the first time and its gate has decided.
    """
    return not compiling() and torch._C._current_graph_task_id() != -1


# torch and mmengine hand one list of missing keys to every layer of a load, which
# tells a new load from the next layer of the same.
_announced_load: Optional[List[str]] = None


def _announce_batch_norm(kind: str, layer: str, missing_keys: List[str]) -> None:
    global _announced_load
    if missing_keys is _announced_load:
        return
    _announced_load = missing_keys
    logger.warning(
        "BatchNorm checkpoint loaded into %s layers (first: '%s'): what BatchNorm lacks starts "
        'neutral and weight is divided by the initial sigmoid(scale_bias) where there is one, '
        "so evaluation gives BatchNorm's outputs.",
        kind,
        layer,
    )


def _unknown_key_message(layer: type, name: str) -> str:
    known = [key for key in inspect.signature(layer).parameters if key != 'unknown']
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f", did you mean '{nearest[0]}'?" if nearest else f'; it takes {", ".join(known)}'
    return f"{layer.__name__} got an unknown key '{name}'{hint}"

"""What the rectified norm layers share: UBN's second stage on BatchNorm's statistics."""

import difflib
import inspect
import logging
import math
import numbers
from collections.abc import Mapping
from typing import Any, Dict, Iterable, List, Optional

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import ops
from ..ops.backend import check_name
from ..ops.utils import compiling
from .guards import BatchNormGuard, callers

logger = logging.getLogger('mmubn')

# What has to fit the input.
_CHECKED = (*ops.Parameters._fields, 'running_mean', 'running_var')
# What BatchNorm's training moves.
TRACKED = ('running_mean', 'running_var', 'num_batches_tracked')
# What a state dict of these layers may hold and one of BatchNorm never does.
_OWN_NAMES = {*ops.Parameters._fields, 'running_similarity'} - {'weight', 'bias'}

# torch and mmengine hand one list of missing keys to every layer of a load, which
# tells a new load from the next layer of the same.
_announced_load: Optional[List[str]] = None


class RectifiedBatchNorm(BatchNormGuard, _BatchNorm):
    r"""BatchNorm with calibrated centering, calibrated scaling and a convolution as affine.

    .. math::
        X_c &= X + w_m \odot \mathrm{GAP}(X) \\
        X_s &= (X_c - \mu) / \sqrt{\sigma^2 + \epsilon} \\
        X_r &= X_s \odot \mathrm{sigmoid}(w_v \odot \mathrm{GAP}(X_s) + w_b) \\
        Y   &= \mathrm{dwconv}_k(X_r;\, \gamma \odot K) + \beta

    The base of :class:`UBN`, :class:`RBN`, :class:`BNET` and :class:`IEBN`, which
    document their settings. It is a subclass of ``_BatchNorm``, for which OpenMMLab
    tests, and not of ``nn.BatchNorm2d``, for which fusing passes look. All parameters
    belong to the layer itself: initialisers would change those of an ``nn.Conv2d``
    child. Subclasses name ``_BatchNorm`` as a base once more, because mmengine's
    initialisers look at direct bases only.
    """

    # BatchNorm's is 2: a state dict that says 3 is ours, whatever it holds.
    _version = 3
    # Initial w_b, and whether the sigmoid sees GAP(X) in place of GAP(X_s).
    _initial_scale_bias = 1.0
    _scale_from_input = False
    # What the layer has. A type that lets the user choose sets them before this constructor.
    kernel_size = 1
    center = False
    scale = False

    # Each is None where the layer does without it.
    kernel: Optional[nn.Parameter]
    center_weight: Optional[nn.Parameter]
    scale_weight: Optional[nn.Parameter]
    scale_bias: Optional[nn.Parameter]

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: Optional[float] = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        backend: str = 'auto',
        device=None,
        dtype=None,
        *,
        bias: bool = True,
        **unknown,
    ) -> None:
        if unknown:
            raise TypeError(_unknown_key_message(type(self), next(iter(unknown))))
        check_integer('kernel_size', self.kernel_size, odd=True)
        for name, value in (('center', self.center), ('scale', self.scale), ('bias', bias)):
            if not isinstance(value, bool):
                raise TypeError(f'{name} must be True or False, got {value!r}')
        check_name(backend)
        factory = dict(device=device, dtype=dtype)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **factory)
        if not bias:  # BatchNorm of torch before 2.12 does not know it
            self.bias = None
        self.backend = backend

        def register(name: str, present: bool, *shape: int) -> None:
            value = nn.Parameter(torch.empty(shape, **factory)) if present else None
            self.register_parameter(name, value)

        side = self.kernel_size
        register('kernel', affine and side > 1, num_features, 1, side, side)
        register('center_weight', self.center, num_features)
        register('scale_weight', self.scale, num_features)
        register('scale_bias', self.scale, num_features)
        self._reset_rectifications()

    def reset_parameters(self) -> None:
        """Sets every parameter and buffer to its initial value."""
        self.reset_running_stats()
        # Not BatchNorm's own, which before torch 2.12 wants a bias.
        for value, initial in ((self.weight, 1), (self.bias, 0)):
            if value is not None:
                nn.init.constant_(value, initial)
        if hasattr(self, 'kernel'):  # BatchNorm's constructor comes here before it exists
            self._reset_rectifications()

    @torch.no_grad()
    def _reset_rectifications(self) -> None:
        if self.kernel is not None:
            _set_identity(self.kernel)
        if self.center_weight is not None:
            self.center_weight.zero_()
        if self.scale_weight is not None:
            self.scale_weight.zero_()
            self.scale_bias.fill_(self._initial_scale_bias)

    def forward(self, input: Tensor) -> Tensor:  # as BatchNorm calls it, which some give by name
        parameters, buffers = self._parameters_of_step(), self._state()
        self._check_input(input, parameters, buffers)
        if input.numel() == 0:
            return self._forward_empty(input, parameters, buffers)
        return self._step(input, parameters, buffers)

    def _step(self, x: Tensor, parameters: ops.Parameters, buffers: ops.Buffers) -> Tensor:
        counts = self.training and self.track_running_stats and buffers.running_mean is None
        if counts and buffers.num_batches_tracked is not None:  # as BatchNorm, with nothing to move
            buffers.num_batches_tracked.add_(1)
        settings = self._settings(buffers)
        return ops.ubn(x, parameters, buffers, settings, self._group(), self.backend)

    def _parameters_of_step(self) -> ops.Parameters:
        weight, kernel, *others = self._tensors(self._parameters, ops.Parameters._fields)
        if weight is None and kernel is not None:  # taken away on the built layer
            weight = kernel.new_ones(len(kernel))
        return ops.Parameters(weight, kernel, *others)

    def _tensors(self, own: Dict[str, Optional[Tensor]], names: Iterable[str]) -> list:
        """Attributes by name, from the dict of nn.Module in which they are, if they are there.

        A parametrized one is not. In a small layer, nn.Module's ``__getattr__`` takes time.
        """
        return [own[name] if name in own else getattr(self, name) for name in names]

    def _state(self) -> ops.Buffers:
        """What a training step moves."""
        mean, var, count = self._tensors(self._buffers, TRACKED)
        if count is None and mean is not None:  # as BatchNorm: nobody counts
            count = torch.zeros((), dtype=torch.long, device=mean.device)
        return ops.Buffers(mean, var, count)

    def _settings(self, buffers: ops.Buffers) -> ops.Settings:
        """What this step does, by what the attributes say at this moment, as in BatchNorm."""
        gate = self._gate_settings(buffers) if self._tracks(buffers) else dict(update=False)
        return ops.Settings(
            eps=self._eps,
            training=self.training or buffers.running_mean is None,
            momentum=self.momentum,
            scale_from_input=self._scale_from_input,
            **gate,
        )

    def _gate_settings(self, buffers: ops.Buffers) -> Dict[str, Any]:
        """The rest of the settings, of a step that belongs into the running statistics.

        They say whether it moves them, and by which gate. A type with a gate overrides this.
        """
        return dict(update=not recomputing())

    def _tracks(self, buffers: ops.Buffers) -> bool:
        """Whether this step belongs into the running statistics."""
        if self.momentum is None and self.num_batches_tracked is None:
            return False  # no average without a count
        return bool(self.training and self.track_running_stats and buffers.running_mean is not None)

    def _group(self) -> Optional[Any]:
        """The processes whose batches are one, None where it is this one alone."""
        return None

    def _forward_empty(self, x: Tensor, parameters: ops.Parameters, buffers: ops.Buffers) -> Tensor:
        # DDP waits for the gradient of every parameter, so all stay in the graph.
        connected = x.new_ones(x.shape[1])
        for parameter in filter(lambda value: value is not None, parameters):
            # The product makes each gradient a tensor of its own: those of the sum alone
            # would be views of one, which DDP and accumulation add to in place.
            own = (0 * parameter).to(x.dtype)
            connected = connected + own.reshape(x.shape[1], -1).sum(1)
        return x * connected.view(1, -1, 1, 1)

    def _check_input(self, x: Tensor, parameters: ops.Parameters, buffers: ops.Buffers) -> None:
        """Raises where BatchNorm does: the backends read what they are given."""
        if not x.is_floating_point() or x.layout != torch.strided:
            raise TypeError(f'expected a dense float input, got {x.dtype}, {x.layout}')
        if x.dim() != 4:
            raise ValueError(f'expected 4D input (got {x.dim()}D input)')
        if self._eps <= 0:
            raise ValueError(f'eps must be positive, got {self._eps}')
        if (parameters.scale_weight is None) != (parameters.scale_bias is None):
            raise ValueError('scale_weight and scale_bias must both be None or neither be None')
        running = buffers.running_mean, buffers.running_var
        if (running[0] is None) != (running[1] is None):
            raise ValueError('running_mean and running_var must both be None or neither be None')
        if running[0] is not None and (running[0].requires_grad or running[1].requires_grad):
            raise RuntimeError('running_mean and running_var take no gradient: detach them')
        channels, dtype, device = x.shape[1], x.dtype, x.device
        wider = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
        vector, kernel = (channels,), parameters.kernel
        for name, value in zip(_CHECKED, (*parameters, *running)):
            if value is None:
                continue
            if value.shape != (vector if value is not kernel else _taps_shape(kernel, channels)):
                _refuse_shape(name, value, x)
            if value.dtype != dtype and value.dtype != wider:
                raise TypeError(f'mixed dtypes: the input is {dtype}, {name} {value.dtype}')
            if value.device != device:
                raise RuntimeError(f'the input is on {device}, {name} on {value.device}')
        if self.training or running[0] is None:
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
        if self._is_batch_norm(state_dict, prefix, local_metadata.get('version')):
            held = {prefix + name: v for name, v in {**self._parameters, **self._buffers}.items()}
            held = {name: value for name, value in held.items() if value is not None}
            names = [n for n in held if n in state_dict and not n.endswith('num_batches_tracked')]
            if all(getattr(state_dict[n], 'shape', None) == held[n].shape for n in names):
                state_dict = {**state_dict, **self._complete_batch_norm(state_dict, prefix)}
                self._announce_batch_norm(state_dict, prefix, missing_keys)
            else:  # torch refuses it, so what BatchNorm lacks stays as well
                state_dict = {**held, **state_dict}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, *args
        )

    def _is_batch_norm(
        self, state_dict: Dict[str, Tensor], prefix: str, version: Optional[int]
    ) -> bool:
        """Whether a state dict certainly has a whole BatchNorm here.

        Part of a checkpoint of ours (a file of several, the statistics alone, a dict with
        keys taken out) must be loaded as it stands: completing it would erase what was
        learned. So all of BatchNorm's tensors are there, and no key of ours, here or in
        another layer. ``version`` is that of the class that wrote the dict, where the dict
        still says so.
        """
        affine = () if self.weight is None else ('weight',)
        tracked = () if self.running_mean is None else ('running_mean', 'running_var')
        has_bias = prefix + 'bias' in state_dict  # some BatchNorms have none
        if version is None and not (affine and has_bias and tracked):
            tracked += ('num_batches_tracked',)
        if version == self._version or not affine + tracked:
            return False
        if any(prefix + name not in state_dict for name in affine + tracked):
            return False
        layers = {prefix}
        whole = _whole_state_dict(state_dict)
        layers.update(key[: -len('running_mean')] for key in whole if key.endswith('running_mean'))
        return not any(layer + name in whole for layer in layers for name in _OWN_NAMES)

    def _announce_batch_norm(
        self, state_dict: Dict[str, Tensor], prefix: str, missing_keys: List[str]
    ) -> None:
        global _announced_load
        if missing_keys is _announced_load:
            return
        _announced_load = missing_keys
        affine = ('weight', 'bias')
        lost = [n for n in affine if prefix + n in state_dict and getattr(self, n) is None]
        logger.warning(
            "BatchNorm checkpoint loaded into %s layers (first: '%s'): what BatchNorm lacks starts "
            'neutral and weight is divided by the initial sigmoid(scale_bias) where there is one, '
            '%s.',
            type(self).__name__,
            prefix[:-1],
            f"but its {' and '.join(lost)} are left out, so outputs differ from BatchNorm's"
            if lost
            else "so evaluation gives BatchNorm's outputs",
        )

    @torch.no_grad()
    def _complete_batch_norm(self, state_dict: Dict[str, Tensor], prefix: str) -> Dict[str, Tensor]:
        """What a BatchNorm's state dict lacks, such that evaluation gives BatchNorm's output."""
        weight = state_dict.get(prefix + 'weight')
        like = state_dict.get(prefix + 'running_mean', weight)
        if like is None:  # a BatchNorm without any tensor
            like = torch.empty((), device='cpu') if self.scale_bias is None else self.scale_bias
        # FSDP may keep the parameters elsewhere than the buffers, on the CPU.
        device = like.device if weight is None else weight.device

        def made(name: str) -> Tensor:
            # Like the parameter: one of FSDP, a DTensor, takes the values of no plain tensor.
            return torch.empty_like(getattr(self, name), dtype=like.dtype, device=device)

        own = {}
        if self.kernel is not None:
            own['kernel'] = _set_identity(made('kernel'))
        for name in ('center_weight', 'scale_weight'):
            if getattr(self, name) is not None:
                own[name] = made(name).zero_()
        if self.scale_bias is not None:
            own['scale_bias'] = made('scale_bias').fill_(self._initial_scale_bias)
            if weight is None:  # nothing can absorb sigmoid(w_b), so it becomes 1
                own['scale_bias'].fill_(40.0)
            else:
                factor = 1 / (1 + math.exp(-self._initial_scale_bias))
                own['weight'] = weight / factor
        if self.bias is not None and prefix + 'bias' not in state_dict:
            own['bias'] = made('bias').zero_()  # BNET begins with another
        if getattr(self, 'running_similarity', None) is not None:
            own['running_similarity'] = like.new_ones(())
        return {prefix + name: value for name, value in own.items()}

    def extra_repr(self) -> str:
        """The settings, BatchNorm's first."""
        shown = ('eps', 'momentum', 'affine', 'track_running_stats')
        shown += ('kernel_size', 'center', 'scale')
        settings = ', '.join(f'{name}={getattr(self, name)}' for name in shown)
        if self.affine and self.bias is None:
            settings += ', bias=False'
        return f'{self.num_features}, {settings}'


def _taps_shape(kernel: Tensor, channels: int) -> tuple:
    side = (1, *kernel.shape)[-1] | 1  # never that of an even one
    return channels, 1, side, side


def _refuse_shape(name: str, value: Tensor, x: Tensor) -> None:
    channels = len(value) if value.dim() else 1
    if channels != x.shape[1]:
        raise ValueError(
            f'expected {channels} channels, got input size {tuple(x.shape)}: {name} has {channels}'
        )
    wanted = '(C, 1, k, k) with an odd k' if name == 'kernel' else '(C,)'
    raise ValueError(f'{name} must have the shape {wanted}, got {tuple(value.shape)}')


def _set_identity(kernel: Tensor) -> Tensor:
    """Makes a depthwise kernel, (C, 1, k, k), the identity, in place."""
    # A DTensor takes no values by index; of FSDP's, each process holds whole channels.
    own = kernel.to_local() if hasattr(kernel, 'to_local') else kernel
    center = kernel.shape[-1] // 2
    own.zero_()[..., center, center] = 1
    return kernel


def recomputing() -> bool:
    """Whether a checkpointed segment is being run again, inside the backward pass.

    Its statistics were counted the first time and its gate has decided.
    """
    return not compiling() and torch._C._current_graph_task_id() != -1


def _whole_state_dict(part: Dict[str, Tensor]) -> Mapping:
    """All that is being loaded.

    torch and mmengine hand a layer its own part alone; the function that was called with the
    whole, ``load_state_dict`` of both, is on the stack.
    """
    for frame in callers():
        whole = frame.f_locals.get('state_dict')
        if frame.f_code.co_name == 'load_state_dict' and isinstance(whole, Mapping):
            return whole
    return part


def check_integer(name: str, value: Any, odd: bool = False) -> None:
    """Raises a ValueError unless ``value`` is an integer (no bool) in its range."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < 1 or (odd and value % 2 == 0):
        kind = 'odd integer' if odd else 'integer'
        raise ValueError(f'{name} must be a positive {kind}, got {value!r}')


def keywords(layer: type) -> List[str]:
    """What the constructor takes by name, itself or by handing it on to that of a base."""
    found = {}
    for kind in layer.__mro__:
        found.update(inspect.signature(kind.__init__).parameters)
    named = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    return [name for name, key in found.items() if key.kind in named and name != 'self']


def _unknown_key_message(layer: type, name: str) -> str:
    known = keywords(layer)
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f", did you mean '{nearest[0]}'?" if nearest else f'; it takes {", ".join(known)}'
    return f"{layer.__name__} got an unknown key '{name}'{hint}"

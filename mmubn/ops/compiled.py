"""A step as one operator of torch, which torch.compile calls and does not look into.

What a compiler makes of the torch backend keeps twice BatchNorm's bytes, as it saves what the
backward pass would make anew, and is slower on the CPU than the backends' own code. So a compiled
network runs the same backend as an eager one. The operators are functional, as those with an
autograd formula must be: they return what the buffers become, and :func:`step` copies it.
"""

from typing import Iterable, List, Optional, Sequence, Tuple, get_type_hints

import torch
from torch import Tensor

from . import backend as backends
from .interface import Buffers, Parameters, Settings
from .step import Step, keeps, step_backward, step_forward
from .utils import dense, statistics_dtype

# How torch's schemas write the types of the fields below.
_TYPES = {
    Optional[Tensor]: 'Tensor?',
    Optional[float]: 'float?',
    float: 'float',
    int: 'int',
    bool: 'bool',
}
_GROUPS = (Parameters, Buffers, Settings)
_NAMES = (*Parameters._fields, *Buffers._fields, *Settings._fields, 'backend')
# The arguments that both operators have, in the order of _NAMES.
_COMMON = ', '.join(
    f'{_TYPES[kind]} {name}' for group in _GROUPS for name, kind in get_type_hints(group).items()
)
_COMMON += ', str backend'

# torch 2.4 and newer.
available = hasattr(torch.library, 'register_autograd')
# Export, whose graph may hold no operator of ours, is told from compilation since torch 2.7;
# before, evaluation is left to torch's own operations.
_tells_export = hasattr(torch.compiler, '_is_exporting_flag')


def serves(settings: Settings) -> bool:
    """Whether the operators can stand in what is being compiled or exported."""
    if not available:
        return False
    # The operators know no transform of torch.func. The compiler, which cannot answer this inside
    # one, leaves the transform to eager mode.
    if torch._C._functorch.maybe_current_level() is not None:
        return False
    if not _tells_export:
        return settings.training
    # Not is_exporting(), which torch.compile folds into True.
    return not torch.compiler._is_exporting_flag


def loses(buffers: Buffers) -> bool:
    """Whether a compiled graph would forget what the step does to the buffers.

    It does so with scalars of float64 on the CPU (seen with torch 2.11, whatever its backend).
    """
    tau = buffers.running_similarity
    return tau is not None and tau.dtype == torch.float64 and tau.device.type == 'cpu'


def step(
    x: Tensor, parameters: Parameters, buffers: Buffers, settings: Settings, backend: str
) -> Tensor:
    """:func:`mmubn.ops.ubn` of one process."""
    # No _replace(), which torch 2.4 does not compile.
    given = [
        _float(value) if name in ('momentum', 'fct') else value
        for name, value in zip(Settings._fields, settings)
    ]
    y, _, _, moved = torch.ops.mmubn.step(x, *parameters, *buffers, *given, backend)
    if settings.training:
        with torch.no_grad():
            for buffer, value in zip(_present(buffers), moved):
                buffer.copy_(value)
    return y


def _grouped(arguments: Sequence) -> Tuple[Parameters, Buffers, Settings, str]:
    """The common arguments of the operators, as :func:`step` has them."""
    given = dict(zip(_NAMES, arguments))
    groups = [group(*[given[name] for name in group._fields]) for group in _GROUPS]
    return (*groups, given['backend'])


def _float(value: Optional[float]) -> Optional[float]:
    return None if value is None else float(value)


def _none(value: Tensor) -> Optional[Tensor]:
    return value if value.numel() else None


def _some(value: Optional[Tensor], like: Tensor) -> Tensor:
    return like.new_empty(0) if value is None else value


def _present(values: Iterable[Optional[Tensor]]) -> List[Tensor]:
    return [value for value in values if value is not None]


# A second import of this file, after a reload or where sys.modules lost it, finds the operators of
# the first; torch takes no other definition of them.
if available and not hasattr(torch.ops.mmubn, 'step'):
    # With flexible_layout, Inductor hands over X in the memory format that it has there. Else it
    # copies the output of a convolution, in channels_last, into the format of eager mode.
    # custom_op takes no tag in torch 2.7. torch 2.4 has no such tag, and copies nothing without it.
    _TAGS = [torch.Tag.pt2_compliant_tag]
    if hasattr(torch.Tag, 'flexible_layout'):
        _TAGS.append(torch.Tag.flexible_layout)

    torch.library.define(
        'mmubn::step', f'(Tensor x, {_COMMON}) -> (Tensor, Tensor, Tensor, Tensor[])', tags=_TAGS
    )

    @torch.library.impl('mmubn::step', 'default')
    def _step(x, *common):
        x = dense(x)  # outputs of other strides would not be the promised ones
        parameters, buffers, settings, backend = _grouped(common)
        moved = Buffers(*[None if value is None else value.clone() for value in buffers])
        chosen = backends.choose(backend, x, parameters.kernel_size)
        y, image_mean, statistics = step_forward(x, parameters, Step(chosen, moved, settings))
        kept = image_mean if keeps(image_mean, x) else None
        return y, _some(kept, statistics), statistics, _present(moved)

    @torch.library.register_fake('mmubn::step')
    def _(x, *common):
        parameters, buffers, settings, _ = _grouped(common)
        dtype = statistics_dtype(x.dtype)
        mean = x.new_empty(x.shape[:2], dtype=dtype)
        known = settings.needs_image_mean(parameters) and keeps(mean, x)
        return (
            torch.empty_like(dense(x)),
            mean if known else mean.new_empty(0),
            x.new_empty(2 * x.shape[1] + 1, dtype=dtype),
            [torch.empty_like(value) for value in _present(buffers)],
        )

    torch.library.define(
        'mmubn::step_backward',
        f'(Tensor dy, Tensor x, Tensor image_mean, Tensor statistics, {_COMMON}) -> Tensor[]',
        tags=_TAGS,
    )

    @torch.library.impl('mmubn::step_backward', 'default')
    def _step_backward(dy, x, image_mean, statistics, *common):
        x = dense(x)
        parameters, buffers, settings, backend = _grouped(common)
        chosen = backends.choose(backend, x, parameters.kernel_size)
        made = Step(chosen, buffers, settings)
        dx, gradients = step_backward(x, dy, _none(image_mean), statistics, parameters, made)
        # Some backends give the parameters' dtype, others that of the statistics.
        return [dx, *[gradient.to(statistics.dtype) for gradient in _present(gradients)]]

    @torch.library.register_fake('mmubn::step_backward')
    def _(dy, x, image_mean, statistics, *common):
        # There is always a gradient of the bias.
        parameters = _grouped(common)[0]._replace(bias=x.new_empty(x.shape[1]))
        return [
            torch.empty_like(dense(x)),
            *[torch.empty_like(v, dtype=statistics.dtype) for v in _present(parameters)],
        ]

    def _setup_context(ctx, inputs, output) -> None:
        x, *common = inputs
        _, image_mean, statistics, _ = output
        parameters, _, ctx.settings, ctx.backend = _grouped(common)
        ctx.has_bias = parameters.bias is not None
        ctx.save_for_backward(x, image_mean, statistics, *parameters._replace(bias=None))

    def _backward(ctx, dy, *ignored):
        x, image_mean, statistics, *parameters = ctx.saved_tensors
        dx, *found = torch.ops.mmubn.step_backward(
            dy, x, image_mean, statistics, *parameters, *Buffers(), *ctx.settings, ctx.backend
        )
        present = zip(Parameters._fields, Parameters(*parameters)._replace(bias=statistics))
        gradients = dict(zip([name for name, value in present if value is not None], found))
        if not ctx.has_bias:
            del gradients['bias']
        return (dx, *[gradients.get(name) for name in _NAMES])

    torch.library.register_autograd('mmubn::step', _backward, setup_context=_setup_context)

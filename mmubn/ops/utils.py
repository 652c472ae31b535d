"""Small things that the ops share."""

from contextlib import nullcontext
from typing import Any, ContextManager, Iterable, Optional, Set

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import (
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)

# What the kernels of C++ and Triton unroll; wider ones would spill registers.
KERNEL_SIZES = (1, 3, 5, 7)


def no_kernel(kernel_size: int) -> str:
    """Why a compiled backend cannot serve a size that is none of :data:`KERNEL_SIZES`."""
    sizes = ', '.join(map(str, KERNEL_SIZES))
    return f'its kernels have kernel_size {sizes}, not {kernel_size}'


# Whether torch.compile or torch.export is reading the code; torch 2.1 and 2.2 have it elsewhere.
compiling = getattr(torch.compiler, 'is_compiling', None) or torch._dynamo.is_compiling


def tracing() -> bool:
    """Whether only torch's own operations can serve.

    What runs is being written down (compile, export, trace), or is transformed: torch.func and
    forward-mode derivatives.
    """
    return compiling() or torch.jit.is_tracing() or _transforming()


def _transforming() -> bool:
    """Whether a transform of torch.func, vmap or forward mode is active."""
    inside = torch._C._functorch.peek_interpreter_stack() is not None
    return inside or forward_ad._current_level >= 0


# Depth of the stack of torch's dispatch modes, which watch every operation.
watching = torch._C._len_torch_dispatch_stack


def checkpointed_selectively() -> bool:
    """Whether selective activation checkpointing is watching.

    In the second run it finds outputs of the first by the order of the operations. What runs
    other operations then has to stay :func:`unseen`.
    """
    modes = _get_current_dispatch_mode_stack() if watching() else ()
    return any(type(mode).__module__ == 'torch.utils.checkpoint' for mode in modes)


def unseen() -> ContextManager:
    """Hides operations from selective activation checkpointing, and from other modes beside it."""
    return _disable_current_modes() if checkpointed_selectively() else nullcontext()


# Whether a tensor is many in one, as is_grads_batched=True makes without a transform. torch 2.1
# has no function for it.
is_batched = getattr(
    torch._C._functorch,
    'is_legacy_batchedtensor',
    lambda x: 'Batched' in repr(torch._C._dispatch_keys(x)),
)


def is_wrapped(x: Tensor) -> bool:
    """Whether a transform of torch.func, such as ``grad`` or ``vmap``, was given ``x``."""
    return not compiling() and torch._C._functorch.is_functorch_wrapped_tensor(x)


def vmap_levels(x: Tensor) -> Set[int]:
    """The levels of torch.func at which ``x`` is many tensors in one."""
    levels = set()
    while is_wrapped(x):
        if torch._C._functorch.is_batchedtensor(x):
            levels.add(torch._C._functorch.maybe_get_level(x))
        x = torch._C._functorch.get_unwrapped(x)
    return levels


def differentiable() -> bool:
    """Whether each operation has to be differentiable by itself, so none may work in place.

    An autograd Function and an evaluation without gradients run with grad mode off.
    """
    return torch.is_grad_enabled() or tracing()


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that statistics of an input of ``dtype`` are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_dense(x: Tensor) -> bool:
    """Whether an image is one stretch of memory, in one of the two memory formats."""
    return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)


def dense(x: Tensor) -> Tensor:
    """``x``, or a copy of it, in one of the two memory formats."""
    return x if is_dense(x) else x.contiguous()


def to_fill(parameter: Optional[Tensor]) -> Optional[Tensor]:
    """What a kernel writes the gradient of a parameter into, which is in one piece as that is."""
    return None if parameter is None else torch.empty_like(parameter)


def refuse_foreign(value: Tensor) -> None:
    """For a tensor that keeps its numbers elsewhere; its address 0 would be read as none at all."""
    raise RuntimeError(
        f'got mixed torch.Tensor and {type(value).__name__}: the input is plain, '
        'a parameter or buffer is not'
    )


def in_one_piece(values: Any) -> Any:
    """A NamedTuple of tensors, with a copy in place of each that is not contiguous."""
    if all(value is None or value.is_contiguous() for value in values):
        return values  # nearly always, and the rest would be felt in a small layer
    return type(values)(*[None if value is None else value.contiguous() for value in values])


def copy_back(originals: Iterable[Optional[Tensor]], moved: Iterable[Optional[Tensor]]) -> None:
    """What became of the copies that stood in for some of ``originals``."""
    if moved is originals:  # as in_one_piece() and its like give them nearly always
        return
    for original, copy in zip(originals, moved):
        if copy is not original:
            original.copy_(copy)

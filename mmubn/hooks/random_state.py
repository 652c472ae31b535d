"""The state of the global random generators."""

import random
from contextlib import contextmanager
from typing import Iterator, NamedTuple, Optional

import numpy as np
import torch
from torch import Tensor


class RandomState(NamedTuple):
    """That of Python, NumPy and torch, on the CPU and on the GPU of this process."""

    python: tuple
    numpy: dict
    torch: Tensor
    cuda: Optional[Tensor]


def random_state() -> RandomState:
    """The state at this moment."""
    return RandomState(
        random.getstate(),
        np.random.get_state(),  # noqa: NPY002
        torch.get_rng_state(),
        torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    )


def set_random_state(state: RandomState) -> None:
    """Puts the generators into a state."""
    random.setstate(state.python)
    np.random.set_state(state.numpy)  # noqa: NPY002
    torch.set_rng_state(state.torch)
    if state.cuda is not None:
        torch.cuda.set_rng_state(state.cuda)


@contextmanager
def isolated_random() -> Iterator[None]:
    """Puts the generators back as they were."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)

"""Small things that the ops share."""

from typing import Iterator

import torch
from torch import Tensor

# What one step of a loop over the batch may hold on the CPU: about the second
# level cache, beyond which a fresh temporary costs more than its arithmetic.
_CHUNK_BYTES = 1 << 20


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that statistics of an input of ``dtype`` are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def batch_slices(x: Tensor) -> Iterator[slice]:
    """Slices of the first dimension: cache-sized on the CPU, a single one elsewhere."""
    batch = x.shape[0]
    step = max(batch, 1)
    if x.device.type == 'cpu' and x.numel():
        item_bytes = x[0].numel() * statistics_dtype(x.dtype).itemsize
        step = max(1, _CHUNK_BYTES // item_bytes)
    return (slice(start, min(start + step, batch)) for start in range(0, batch, step))

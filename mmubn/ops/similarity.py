"""Mean pairwise cosine similarity of the features of a batch, in linear time."""

from typing import Optional

import torch
from torch import Tensor

from . import backend as backends
from .utils import batch_slices, statistics_dtype


@torch.no_grad()
def mean_cosine_similarity(
    x: Tensor, squared_norm: Optional[Tensor] = None, backend: str = 'auto'
) -> Tensor:
    r"""Mean over :math:`i \ne j` of :math:`\cos(\mathrm{vec} X_i, \mathrm{vec} X_j)`, no gradient.

    With unit vectors :math:`u_i` of the N' non-zero features,

    .. math::
        \sum_{i \ne j} u_i \cdot u_j = \Big\| \sum_i u_i \Big\|^2 - N', \qquad
        s = \frac{\| \sum_i u_i \|^2 - N'}{N (N - 1)},

    which reads the batch once and needs no N x N matrix: O(N D) for D numbers a
    feature. A zero feature counts as similarity 0 to all others.

    Args:
        x (Tensor): Features, (N, ...), any float dtype and memory format.
        squared_norm (Tensor, optional): :math:`\|\mathrm{vec} X_i\|^2`, (N,), where
            it is known already (the second moments hold it). Default: computed.
        backend (str): ``'auto'``, ``'torch'`` or ``'triton'``.

    Returns:
        Tensor: Scalar in [-1 / (N - 1), 1], float32 (float64 for float64 input).
        NaN where the similarity is undefined: fewer than two features, or
        features that are not finite or whose squared norm overflows.

    Source: UBN (arXiv 2311.15993), section 3.3.1.
    """
    dtype = statistics_dtype(x.dtype)
    batch = x.shape[0]
    if batch < 2:
        return x.new_full((), float('nan'), dtype=dtype)
    if squared_norm is None:
        flat = x.flatten(1)
        norms = [torch.linalg.vector_norm(flat[p], dim=1, dtype=dtype) for p in batch_slices(x)]
        squared_norm = torch.cat(norms).square()
    nonzero = squared_norm > 0
    inverse_norm = torch.where(nonzero, squared_norm, 1.0).rsqrt() * nonzero
    total = backends.choose(backend, x).squared_sum(x, inverse_norm)
    similarity = (total - nonzero.sum()) / (batch * (batch - 1))
    return torch.where(squared_norm.isfinite().all(), similarity, float('nan'))

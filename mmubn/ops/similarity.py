"""Mean pairwise cosine similarity of the features of a batch, in linear time."""

from typing import Optional

import torch
from torch import Tensor

from . import backend as backends
from .torch_backend import similarity_of_unit_vectors, squared_norms
from .utils import statistics_dtype


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
        backend (str): One of :data:`mmubn.ops.BACKENDS`.

    Returns:
        Tensor: Scalar in [-1 / (N - 1), 1], float32 (float64 for float64 input).
        NaN where the similarity is undefined: fewer than two features, or
        features that are not finite or whose squared norm overflows.

    Raises:
        RuntimeError: The backend of that name cannot serve.
        ValueError: There is no backend of that name.

    Source: UBN (arXiv 2311.15993), section 3.3.1.
    """
    if len(x) < 2:
        return x.new_full((), float('nan'), dtype=statistics_dtype(x.dtype))
    if squared_norm is None:
        squared_norm = squared_norms(x)
    squared_norm = squared_norm.to(statistics_dtype(x.dtype))
    return similarity_of_unit_vectors(x, squared_norm, backends.choose(backend, x))

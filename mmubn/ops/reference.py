r"""The method, literally: the equations of the paper in plain torch.

This is the oracle of the tests and the baseline of the benchmarks. It branches
in Python, builds the N x N similarity matrix and keeps every intermediate
tensor; nothing in the layers calls it.

Source: UBN, arXiv 2311.15993, Eqs. 3 to 5; RBN, CVPR 2021; BNET, TPAMI 2023.
"""

from typing import Dict, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor


def mean_cosine_similarity(x: Tensor) -> Tensor:
    r"""Mean over :math:`i \ne j` of :math:`\cos(\mathrm{vec} X_i, \mathrm{vec} X_j)`.

    Args:
        x (Tensor): Features of shape (N, ...). A zero feature has similarity 0
            to all others.

    Returns:
        Tensor: Scalar; NaN for fewer than two features.
    """
    flat = x.flatten(1)
    norm = flat.norm(dim=1, keepdim=True)
    unit = flat / torch.where(norm > 0, norm, torch.ones_like(norm))
    cosine = unit @ unit.T
    off_diagonal = ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    return cosine[off_diagonal].mean()


def normalize(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    weight: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
    kernel: Optional[Tensor] = None,
    scale_weight: Optional[Tensor] = None,
    scale_bias: Optional[Tensor] = None,
    scale_from: Optional[Tensor] = None,
) -> Tensor:
    r"""Scaling, rectification and affine of an already centred input.

    .. math::
        X_s &= (X_c - \mu) / \sqrt{\sigma^2 + \epsilon} \\
        X_r &= X_s \odot \mathrm{sigmoid}(w_v \odot \mathrm{GAP}(X_s) + w_b) \\
        Y   &= \mathrm{dwconv}_k(X_r;\, \gamma \odot K) + \beta

    Args:
        x (Tensor): :math:`X_c`, (N, C, H, W).
        mean (Tensor): :math:`\mu` of :math:`X_c`, (C,).
        var (Tensor): :math:`\sigma^2` of :math:`X_c`, biased, (C,).
        eps (float): :math:`\epsilon`.
        weight (Tensor, optional): :math:`\gamma`, (C,).
        bias (Tensor, optional): :math:`\beta`, (C,).
        kernel (Tensor, optional): :math:`K`, (C, 1, k, k).
        scale_weight (Tensor, optional): :math:`w_v`, (C,).
        scale_bias (Tensor, optional): :math:`w_b`, (C,).
        scale_from (Tensor, optional): What the sigmoid pools in place of
            :math:`X_s`; IEBN pools X.

    Returns:
        Tensor: :math:`Y`, (N, C, H, W).
    """
    y = (x - _column(mean)) / torch.sqrt(_column(var) + eps)
    if scale_weight is not None:
        pooled = (y if scale_from is None else scale_from).mean(dim=(2, 3), keepdim=True)
        y = y * torch.sigmoid(_column(scale_weight) * pooled + _column(scale_bias))
    if kernel is not None:
        taps = kernel if weight is None else weight.view(-1, 1, 1, 1) * kernel
        return F.conv2d(y, taps, bias, padding=kernel.shape[-1] // 2, groups=x.shape[1])
    if weight is not None:
        y = y * _column(weight) + _column(bias)
    return y


def ubn_step(
    x: Tensor,
    params: Dict[str, Tensor],
    buffers: Dict[str, Tensor],
    *,
    training: bool,
    fct: Optional[float] = 0.15,
    fct_momentum: float = 0.1,
    fct_warmup: int = 0,
    momentum: Optional[float] = 0.1,
    eps: float = 1e-5,
    scale_from_input: bool = False,
) -> Tuple[Tensor, Dict[str, Tensor]]:
    r"""One call of a UBN layer as a pure function of its state.

    With ``fct=None`` and the parameters that a layer has it is RBN, BNET, IEBN
    (``scale_from_input``) or BatchNorm.

    Stage 1, in training (Eq. 3):

    .. math::
        \tau \leftarrow (1 - \alpha) \tau + \alpha s, \qquad
        (\mu, \sigma^2) = \text{batch statistics if } \tau > \mathrm{FCT}
        \text{ else running statistics}

    The running statistics move only in the first case. Stage 2 is Eqs. 4 and 5,
    with :math:`X_c = X + w_m \odot \mathrm{GAP}(X)`.

    Args:
        x (Tensor): Input, (N, C, H, W).
        params (dict): The layer's parameters by their state-dict names; what is
            absent is switched off.
        buffers (dict): ``running_mean``, ``running_var``,
            ``num_batches_tracked``, ``running_similarity``.
        training (bool): Whether to use and update statistics as in training.
        fct (float, optional): Threshold; None switches stage 1 off.
        fct_momentum (float): :math:`\alpha`.
        fct_warmup (int): Batches in the running statistics before they may
            normalise. 0 gives the equations of the paper.
        momentum (float, optional): m; None is the cumulative average.
        eps (float): :math:`\epsilon`.
        scale_from_input (bool): Whether the sigmoid sees GAP(X), as in IEBN.

    Returns:
        tuple[Tensor, dict]: The output, and the buffers after the call.
    """
    buffers = dict(buffers)
    if 'center_weight' in params:
        x_c = x + _column(params['center_weight']) * x.mean(dim=(2, 3), keepdim=True)
    else:
        x_c = x
    mean, var = buffers['running_mean'], buffers['running_var']
    if training:
        condensed = True
        if fct is not None:
            similarity = mean_cosine_similarity(x.detach())
            if torch.isfinite(similarity):
                buffers['running_similarity'] = (1 - fct_momentum) * buffers[
                    'running_similarity'
                ] + fct_momentum * similarity
            warming_up = int(buffers['num_batches_tracked']) < fct_warmup
            condensed = warming_up or bool(buffers['running_similarity'] > fct)
        if condensed:
            mean = x_c.mean(dim=(0, 2, 3))
            var = x_c.var(dim=(0, 2, 3), unbiased=False)
            values = x_c.numel() // x_c.shape[1]
            batch_mean, batch_var = mean.detach(), var.detach() * (values / (values - 1))
            if torch.isfinite(batch_mean).all() and torch.isfinite(batch_var).all():
                count = buffers['num_batches_tracked'] + 1
                factor = 1 / float(count) if momentum is None else momentum
                buffers['num_batches_tracked'] = count
                buffers['running_mean'] = (1 - factor) * buffers[
                    'running_mean'
                ] + factor * batch_mean
                buffers['running_var'] = (1 - factor) * buffers['running_var'] + factor * batch_var
    rest = {name: value for name, value in params.items() if name != 'center_weight'}
    scale_from = x if scale_from_input else None
    return normalize(x_c, mean, var, eps, **rest, scale_from=scale_from), buffers


def _column(value: Tensor) -> Tensor:
    return value.view(1, -1, 1, 1)

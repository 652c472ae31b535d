"""What fct_interval and fct_stride do to UBN's running similarity: followed beside a training.

Takes, at every UBN layer and in every step, the similarity of all positions and of every few
rows and columns. From these it follows the running similarity that each setting would have
had, beside that of measuring everything in every step.
"""

from collections import defaultdict
from itertools import product
from typing import Dict, List, Tuple

import torch
from torch import Tensor, nn

from .layers import UBN
from .layers.base import recomputing
from .ops import mean_cosine_similarity

COLUMNS = ('fct_interval', 'fct_stride', 'mean_difference', 'largest_difference', 'gates_differing')


def record(
    model: nn.Module, strides: List[int]
) -> Tuple[Dict[str, UBN], Dict[str, Dict[int, List[Tensor]]]]:
    """Lets every training step leave the similarities of each UBN layer, per stride.

    Args:
        model (nn.Module): It is put into training mode.
        strides (list[int]): As ``fct_stride``, with 1 among them: all positions.

    Returns:
        tuple[dict, dict]: The layers by name; by name and stride one scalar for each step, which
        come as the model trains.

    Raises:
        ValueError: The model has no UBN layer, none with a gate, or none whose statistics train.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, UBN)}
    if not layers:
        raise ValueError("config: no UBN layer to measure; set norm_cfg=dict(type='UBN')")
    layers = {name: layer for name, layer in layers.items() if layer.fct is not None}
    if not layers:
        raise ValueError('config: no UBN layer has a gate to follow; set a threshold fct')
    model.train()  # norm_eval and frozen_stages put layers back into evaluation
    layers = {name: layer for name, layer in layers.items() if layer.training}
    if not layers:
        raise ValueError(
            'config: all UBN layers have frozen statistics and measure nothing; set norm_eval=False'
        )
    seen = {name: defaultdict(list) for name in layers}

    def hook_of(name: str):
        @torch.no_grad()
        def hook(module: UBN, args: Tuple[Tensor, ...], kwargs: Dict[str, Tensor]) -> None:
            if module.training and not recomputing():
                (x,) = *args, *kwargs.values()  # by place or by name
                for stride in strides:
                    positions = x[:, :, ::stride, ::stride]
                    seen[name][stride].append(mean_cosine_similarity(positions))

        return hook

    for name, module in layers.items():
        module.register_forward_pre_hook(hook_of(name), with_kwargs=True)
    return layers, seen


def follow(similarities: Tensor, momentum: float, interval: int) -> Tensor:
    r"""The running similarity after every step, from 1, as the layer moves it.

    .. math::
        \tau \leftarrow (1 - \alpha)^k \tau + (1 - (1 - \alpha)^k) s \quad
        \text{in every k-th step}

    Args:
        similarities (Tensor): s of all steps, (T,).
        momentum (float): :math:`\alpha`, ``fct_momentum``.
        interval (int): k, ``fct_interval``.

    Returns:
        Tensor: :math:`\tau`, (T,).
    """
    tau, taus = torch.ones(()), []
    for step, similarity in enumerate(similarities):
        if step % interval == 0 and similarity.isfinite():
            tau = tau.lerp(similarity, 1 - (1 - momentum) ** interval)
        taus.append(tau)
    return torch.stack(taus)


def compare(
    layers: Dict[str, UBN],
    seen: Dict[str, Dict[int, List[Tensor]]],
    intervals: List[int],
    strides: List[int],
) -> List[Tuple]:
    """A row of :data:`COLUMNS` for each setting, over all steps and all layers that were run.

    Args:
        layers (dict[str, UBN]): Those of :func:`record`.
        seen (dict): The similarities of :func:`record`.
        intervals (list[int]): Values of ``fct_interval``.
        strides (list[int]): Values of ``fct_stride`` that were recorded.
    """
    layers = {name: layer for name, layer in layers.items() if seen[name][1]}
    rows = []
    for interval, stride in product(intervals, strides):
        differences, gates = [], []
        for name, layer in layers.items():
            every = follow(torch.stack(seen[name][1]).cpu(), layer.fct_momentum, 1)
            some = follow(torch.stack(seen[name][stride]).cpu(), layer.fct_momentum, interval)
            differences.append((some - every).abs())
            gates.append((some > layer.fct) != (every > layer.fct))
        difference, gate = torch.cat(differences), torch.cat(gates).float()
        rows.append(
            (interval, stride, *map(float, (difference.mean(), difference.max(), gate.mean())))
        )
    return rows

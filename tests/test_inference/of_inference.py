"""What the tests of mmubn.inference share."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmubn import layers

KINDS = [kind for kind in layers.__all__ if kind != 'SyncUBN']  # which is UBN there


@torch.no_grad()
def randomize(model: nn.Module, spread: float = 0.2) -> nn.Module:
    """Statistics and parameters of the norm layers away from where they start."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            if module.track_running_stats:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
            for parameter in module.parameters():
                parameter.add_(spread * torch.randn_like(parameter))
    return model.eval()


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    scale = expected.double().abs().max()
    return ((actual.double() - expected.double()).abs().max() / scale).item()

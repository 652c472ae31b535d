"""Weights as after a training, and how far two results are apart."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def trained(model: nn.Module, spread: float = 0.2) -> nn.Module:
    """The model in evaluation, with nothing of its norm layers at the initial value."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.num_batches_tracked.fill_(1000)
        if isinstance(module, (_BatchNorm, nn.GroupNorm)):
            for parameter in module.parameters():
                parameter.add_(spread * torch.randn_like(parameter))
    model.eval()  # mmdet's backbones return nothing
    return model


def difference(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    scale = expected.double().abs().max()
    return ((actual.double() - expected.double()).abs().max() / scale).item()


def assert_same_state(actual, expected, **tolerance) -> None:
    """Of two modules or state dicts; bit for bit without a tolerance."""
    actual, expected = (
        s.state_dict() if isinstance(s, nn.Module) else s for s in (actual, expected)
    )
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name],
            value,
            **(tolerance or dict(rtol=0, atol=0)),
            msg=lambda message, name=name: f'{name}: {message}',
        )

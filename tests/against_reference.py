"""The layers beside their reference."""

from typing import Dict

import pytest
import torch
from torch import Tensor

from mmubn.layers import BNET, IEBN, RBN, UBN
from mmubn.ops import reference

# Every switch of the layers, and the baselines: name -> constructor.
LAYERS = {
    'ubn': lambda c, **kw: UBN(c, fct_warmup=0, **kw),
    'ubn_k5': lambda c, **kw: UBN(c, fct_warmup=0, kernel_size=5, **kw),
    'ubn_center': lambda c, **kw: UBN(c, fct_warmup=0, kernel_size=1, scale=False, **kw),
    'ubn_scale': lambda c, **kw: UBN(c, fct_warmup=0, kernel_size=1, center=False, **kw),
    'ubn_gate': lambda c, **kw: UBN(
        c, fct_warmup=0, kernel_size=1, center=False, scale=False, **kw
    ),
    'ubn_affine': lambda c, **kw: UBN(c, fct=None, center=False, scale=False, **kw),
    'rbn': RBN,
    'bnet': BNET,
    'iebn': IEBN,
}


def randomize(layer: torch.nn.Module) -> None:
    """Moves every parameter off its initial value, where a wrong term could hide."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


MODES = {'open': (-1.0, True), 'shut': (1.0, True), 'evaluation': (1.0, False)}


def set_mode(layer: torch.nn.Module, mode: str) -> None:
    """One of ``MODES``; without a gate there is none to shut."""
    fct, training = MODES[mode]
    if getattr(layer, 'fct', None) is not None:
        layer.fct = fct
    elif mode == 'shut':
        pytest.skip('no gate')
    layer.train(training)


class Reference:
    """The literal equations with the state of a layer, in float64."""

    def __init__(self, layer: torch.nn.Module):
        self.layer = layer
        self.params: Dict[str, Tensor] = {
            name: value.detach().clone().double().requires_grad_()
            for name, value in layer.named_parameters()
        }
        self.buffers = {
            name: value.clone() if value.dtype == torch.long else value.clone().double()
            for name, value in layer.named_buffers()
        }

    def __call__(self, x: Tensor) -> Tensor:
        layer = self.layer
        y, self.buffers = reference.ubn_step(
            x,
            self.params,
            self.buffers,
            training=layer.training,
            fct=getattr(layer, 'fct', None),
            fct_momentum=getattr(layer, 'fct_momentum', 0.1),
            fct_warmup=getattr(layer, 'fct_warmup', None) or 0,
            momentum=layer.momentum,
            eps=float(layer.eps),
            scale_from_input=layer._scale_from_input,
        )
        return y


def pairwise(x: Tensor) -> float:
    """Mean cosine over i != j from the N x N matrix, in float64."""
    return reference.mean_cosine_similarity(x.detach().double()).item()


def assert_equals_reference(layer, oracle, x: Tensor, rtol: float, atol: float) -> None:
    """One step, with a random upstream gradient: output, every gradient, every buffer."""
    x_layer = x.detach().requires_grad_()  # strides as they are
    x_oracle = x.detach().clone().double().requires_grad_()
    layer.zero_grad()
    for parameter in oracle.params.values():
        parameter.grad = None
    y, expected = layer(x_layer), oracle(x_oracle)
    upstream = torch.randn_like(expected)
    y.backward(upstream.to(y.dtype))
    expected.backward(upstream)
    assert y.dtype == x.dtype
    compare = {'output': (y, expected), 'gradient of the input': (x_layer.grad, x_oracle.grad)}
    for name, parameter in layer.named_parameters():
        compare[f'gradient of {name}'] = parameter.grad, oracle.params[name].grad
    for name, buffer in layer.named_buffers():
        compare[name] = buffer, oracle.buffers[name]
    for name, (actual, wanted) in compare.items():
        torch.testing.assert_close(
            actual.double(),
            wanted.double(),
            rtol=rtol,
            atol=atol * max(1.0, wanted.abs().max().item()),
            msg=lambda message, name=name: f'{name}: {message}',
        )

"""Lets the FLOP counters of mmengine and fvcore count the norm layers.

These counters trace the model and have a formula for each operator. What a norm layer of
this package does is spread over operators that have none, so that it would cost less than
BatchNorm in their tables. While one of them traces, each layer is one operator, with the
formula below.

A multiply-add counts as one, as there. With n the numbers in the output,

    flops = n (p + b + a)

p is 1 for a layer that takes the mean of each image and channel (``center``, ``scale``); b is
1 for the normalization, in training 4 with the statistics, as the counters have it for
BatchNorm; a is k² for a convolution as affine, 1 for a plain affine, 0 for none.

``torch.utils.flop_counter.FlopCounterMode`` needs nothing from here: it counts convolutions
alone, sees these among the operators of the ``'torch'`` backend, and gives BatchNorm 0.
"""

import functools
import math
from collections import Counter
from importlib import import_module
from types import ModuleType
from typing import Any, Callable, List

import torch
from torch import Tensor, nn

from .layers.base import RectifiedBatchNorm


def register_mmengine() -> None:
    """Teaches ``mmengine.analysis`` the layers; :mod:`mmubn` does it when it is imported."""
    from mmengine.analysis import complexity_analysis, jit_analysis

    complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS[_KIND] = _flops
    complexity_analysis._DEFAULT_SUPPORTED_ACT_OPS[_KIND] = _activations
    _trace_layers_whole(jit_analysis)


def register_fvcore() -> None:
    """Teaches fvcore the layers, for ``FlopCountAnalysis`` and ``ActivationCountAnalysis``.

    Example:
        >>> mmubn.flops.register_fvcore()
        >>> fvcore.nn.FlopCountAnalysis(model, images).total()
    """
    for name, formula in (('flop_count', _flops), ('activation_count', _activations)):
        # fvcore.nn has functions of the modules' names.
        import_module(f'fvcore.nn.{name}')._DEFAULT_SUPPORTED_OPS[_KIND] = formula
    _trace_layers_whole(import_module('fvcore.nn.jit_analysis'))


class _WholeNorm(torch.autograd.Function):
    """Runs a layer as one operator of the traced graph, which keeps the layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Callable, layer: nn.Module) -> Tensor:
        y = torch.empty_like(x)
        state = torch._C._get_tracing_state()
        torch._C._set_tracing_state(None)  # else the operators inside are in the graph too
        try:
            return y.copy_(forward(x))
        finally:
            torch._C._set_tracing_state(state)


_KIND = f'prim::PythonOp.{_WholeNorm.__name__}'


def _trace_layers_whole(jit_analysis: ModuleType) -> None:
    """Wraps the function by which a counter traces a model."""
    trace = jit_analysis._get_scoped_trace_graph
    if hasattr(trace, '__wrapped__'):
        return

    @functools.wraps(trace)
    def wrapper(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        layers = [m for m in module.modules() if isinstance(m, RectifiedBatchNorm)]
        own = [vars(layer).get('forward') for layer in layers]  # that a user put there
        for layer in layers:
            layer.forward = functools.partial(_forward, layer.forward, layer)
        try:
            return trace(module, *args, **kwargs)
        finally:
            for layer, forward in zip(layers, own):
                del layer.forward  # the class has it
                if forward is not None:
                    layer.forward = forward

    jit_analysis._get_scoped_trace_graph = wrapper


def _forward(forward: Callable, layer: nn.Module, *args: Tensor, **kwargs: Tensor) -> Tensor:
    (x,) = (*args, *kwargs.values())
    return _WholeNorm.apply(x, forward, layer)


def _flops(inputs: List[Any], outputs: List[Any]) -> Counter:
    layer, numel = _layer_of(outputs)
    kernel = getattr(layer, 'kernel', None)
    pooled = any(
        getattr(layer, name, None) is not None for name in ('center_weight', 'scale_weight')
    )
    normalized = 4 if layer.training or layer.running_mean is None else 1
    affine = kernel.shape[-1] ** 2 if kernel is not None else layer.weight is not None
    return Counter({type(layer).__name__: numel * (pooled + normalized + affine)})


def _activations(inputs: List[Any], outputs: List[Any]) -> Counter:
    """The output of a convolution; of others none, as for BatchNorm."""
    layer, numel = _layer_of(outputs)
    has_convolution = getattr(layer, 'kernel', None) is not None
    return Counter({type(layer).__name__: numel * has_convolution})


def _layer_of(outputs: List[Any]) -> tuple:
    """The layer behind a node of the graph, and the numbers in its output."""
    (output,) = outputs
    _, layer = output.node().scalar_args()
    return layer, math.prod(output.type().sizes())

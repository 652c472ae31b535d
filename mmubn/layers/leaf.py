"""What a symbolic trace and torch.jit.script make of a layer."""

from functools import partial

import torch.fx


class Leaf:
    """Mixin before a module: a symbolic trace does not look inside, as into no layer of torch."""

    def __prepare_scriptable__(self):
        """What ``torch.jit.script`` asks every module for."""
        raise RuntimeError(
            f'torch.jit.script cannot compile {type(self).__name__}: use torch.export.export or '
            'torch.jit.trace (which newer torch deprecates) on the model in evaluation '
            '(model.eval())'
        )

    def __call__(self, *args, **kwargs):
        """Calls the layer; in a symbolic trace it is a leaf, as BatchNorm is.

        Here, because hooks and what a subclass adds to forward belong into the leaf: after a
        trace through them they would run twice.
        """
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.fx.Proxy):
                leaf = partial(self._leaf, value.tracer)
                return value.tracer.call_module(self, leaf, args, kwargs)
        return super().__call__(*args, **kwargs)

    def _leaf(self, tracer: torch.fx.Tracer, *args, **kwargs) -> torch.fx.Proxy:
        """Its call, where the tracer would look inside."""
        return tracer.create_proxy('call_module', tracer.path_of_module(self), args, kwargs)

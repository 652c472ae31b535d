"""Finds the convolution before each norm layer, where it is certain.

Certain means: whenever the layer is called, its input is what one convolution has just given,
nothing else reads that, and whenever the convolution is called, that layer follows. torch.fx
reads it from the model's forward; where forward depends on what it is given, a run is watched
instead.
"""

import copy
import inspect
import weakref
from collections import defaultdict
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple

import torch
import torch.fx
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from .aside import Aside


class Calls:
    """Who was called with whose output.

    ``inputs`` has for each norm layer, by id, what its inputs came from, call by call: a
    module, or None where that is not known. ``outputs`` has for each convolution the modules
    that read its output, call by call: a list of one where that was one. ``weights_read`` has
    the ids of the convolutions and norm layers whose weights anything else reads.
    """

    def __init__(self) -> None:
        self.inputs: Dict[int, List[Optional[nn.Module]]] = defaultdict(list)
        self.outputs: Dict[int, List[List[Optional[nn.Module]]]] = defaultdict(list)
        self.weights_read: Set[int] = set()

    def convolution_before(self, norm: nn.Module) -> Tuple[Optional[nn.Module], str]:
        """The convolution that can take part of the layer in, or None and why there is none."""
        sources = self.inputs[id(norm)]
        if not sources:
            return None, 'it is not called'
        conv = sources[0]
        if any(source is not conv for source in sources):
            return None, 'it is called on outputs of several layers'
        if not isinstance(conv, CONVOLUTIONS):
            return None, 'it does not follow a convolution'
        if type(conv) not in CONVOLUTIONS:  # it may do something else with its weights
            return None, f'it follows {type(conv).__name__}, a convolution of another kind'
        if 'forward' in vars(conv):
            return None, 'the forward of the convolution before it was replaced on the layer'
        if any(len(readers) != 1 for readers in self.outputs[id(conv)]):
            return None, 'its input is read elsewhere too'
        if any(readers[0] is not norm for readers in self.outputs[id(conv)]):
            return None, 'the convolution before it serves other layers too'
        if id(conv) in self.weights_read:
            return None, 'the weights of the convolution before it are read elsewhere'
        if conv._forward_hooks or conv._forward_pre_hooks:
            return None, 'the convolution before it has hooks'
        return conv, ''


CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)


def _owners(model: nn.Module, norms: Sequence[nn.Module]) -> Dict[int, List[nn.Module]]:
    """Convolutions and norm layers by the ids of their parameters: several share a tied one."""
    owners: Dict[int, List[nn.Module]] = defaultdict(list)
    convolutions = [module for module in model.modules() if isinstance(module, CONVOLUTIONS)]
    for module in (*convolutions, *norms):
        for parameter in module.parameters():
            owners[id(parameter)].append(module)
    return owners


def _twin(model: nn.Module) -> nn.Module:
    """A copy with the same parameters: what a call leaves in buffers and attributes stays there."""
    return copy.deepcopy(model, {id(value): value for value in model.parameters()})


class _Tracer(torch.fx.Tracer):
    """Does not look into modules that have neither a convolution nor a norm inside.

    Raises a ValueError at such a module that can reach one which is registered elsewhere. What it
    is given is that of ``model``, of which a copy is traced.
    """

    def __init__(self, model: nn.Module, norms: Sequence[nn.Module], aside: Aside) -> None:
        super().__init__()
        self._model = model
        self._norms = {id(norm) for norm in norms}
        self._aside = aside
        self._proxies: List[weakref.ref] = []

    def proxy(self, node: torch.fx.Node) -> torch.fx.Proxy:
        proxy = super().proxy(node)
        self._proxies.append(weakref.ref(proxy))
        return proxy

    def kept(self) -> Set[torch.fx.Node]:
        """What forward left where it outlives the call, such as in an attribute of a module."""
        return {proxy().node for proxy in self._proxies if proxy() is not None}

    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        module = self._model.get_submodule(qualified_name)
        alone = self._concerns(module) or super().is_leaf_module(m, qualified_name)
        if not alone and any(map(self._concerns, module.modules())):
            return False
        for other in self._aside.within_reach(module).values():
            if other is not module and self._concerns(other):
                raise ValueError(f'{qualified_name} may call or read {type(other).__name__} unseen')
        return True

    def _concerns(self, module: nn.Module) -> bool:
        return id(module) in self._norms or isinstance(module, CONVOLUTIONS)


def read_forward(model: nn.Module, norms: Sequence[nn.Module], aside: Aside) -> Calls:
    """The calls that ``model.forward`` makes, its optional arguments left at their defaults.

    Args:
        model (nn.Module): In evaluation mode.
        norms (Sequence[nn.Module]): The layers to find convolutions for.
        aside (Aside): Of the model.

    Returns:
        Calls: Those of ``norms`` and of all convolutions.

    Raises:
        Exception: Of any kind, where torch.fx cannot read it, or would give its proxies to hooks,
            or does not look into a module that can reach a convolution or norm outside of it.
    """
    if 'forward' in vars(model):  # torch.fx reads that of the class
        raise ValueError('the forward of the model was replaced')
    wanted = {id(norm) for norm in norms}  # leaves, whose hooks the tracer does not run
    for name, module in model.named_modules():
        has_hooks = module._forward_hooks or module._forward_pre_hooks
        if has_hooks and any(module.children()) and id(module) not in wanted:
            raise ValueError(f'{name or "the model"} has hooks')
    parameters = inspect.signature(model.forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    twin = _twin(model)
    tracer = _Tracer(model, norms, aside)
    graph = tracer.trace(twin, defaults)
    kept = tracer.kept()
    calls = Calls()

    def module_of(node: torch.fx.Node) -> Optional[nn.Module]:
        return model.get_submodule(node.target) if node.op == 'call_module' else None

    owners = _owners(model, norms)
    for node in graph.nodes:
        module = module_of(node)
        if node.op == 'get_attr':
            owner, _, name = node.target.rpartition('.')
            value = getattr(twin.get_submodule(owner), name)
            calls.weights_read.update(map(id, owners.get(id(value), ())))
        elif isinstance(module, CONVOLUTIONS):
            readers = [module_of(user) for user in node.users]
            calls.outputs[id(module)].append(readers + [None] * (node in kept))
        elif id(module) in wanted:
            calls.inputs[id(module)].append(module_of(node.all_input_nodes[0]))
    return calls


class _Watcher(TorchDispatchMode):
    """Notes every operation outside the layers that reads a convolution's output or weight."""

    def __init__(self, model: nn.Module, norms: Sequence[nn.Module]) -> None:
        super().__init__()
        self.calls = Calls()
        # The norm layers and convolutions that run now, whose own operations do not count.
        self._inside: List[nn.Module] = []
        # By the id of a tensor. Ids are given again, so a reference tells whether it is that one.
        self._made: Dict[int, Tuple[weakref.ref, nn.Module, List[Optional[nn.Module]]]] = {}
        self._owners = _owners(model, norms)
        self.twin = _twin(model)  # which runs, and ends with its hooks
        self._original = dict(zip(self.twin.modules(), model.modules()))
        watched = {id(norm) for norm in norms}
        for module, original in self._original.items():
            if isinstance(module, CONVOLUTIONS):
                self._watch(module, self._enter, self._convolved)
            elif id(original) in watched:
                self._watch(module, self._normalizes, self._leave)

    def _watch(self, module: nn.Module, before: Any, after: Any) -> None:
        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after)

    def _enter(self, module: nn.Module, args: Tuple, kwargs: Dict[str, Any]) -> None:
        self._read((args, kwargs))
        self._inside.append(module)

    def _leave(self, module: nn.Module, args: Tuple, output: Tensor) -> None:
        self._inside.pop()

    def _convolved(self, module: nn.Module, args: Tuple, output: Tensor) -> None:
        self._inside.pop()
        readers: List[Optional[nn.Module]] = []
        module = self._original[module]
        self.calls.outputs[id(module)].append(readers)
        self._made[id(output)] = weakref.ref(output), module, readers

    def _normalizes(self, module: nn.Module, args: Tuple, kwargs: Dict[str, Any]) -> None:
        (x,) = (*args, *kwargs.values())
        self._inside.append(module)
        module = self._original[module]
        source, readers = self._maker(x)
        self.calls.inputs[id(module)].append(source)
        readers.append(module)

    def _maker(self, value: Any) -> Tuple[Optional[nn.Module], List[Optional[nn.Module]]]:
        """The convolution that gave this very tensor, and the readers of it so far."""
        reference, module, readers = self._made.get(id(value), (None, None, []))
        return (module, readers) if reference is not None and reference() is value else (None, [])

    def _read(self, values: Any) -> None:
        for value in tree_flatten(values)[0]:
            self._maker(value)[1].append(None)
        self._read_weights(values)

    def _read_weights(self, values: Any) -> None:
        own = {id(value) for module in self._inside[-1:] for value in module._parameters.values()}
        for value in tree_flatten(values)[0]:
            if id(value) not in own:
                self.calls.weights_read.update(map(id, self._owners.get(id(value), ())))

    def finish(self, result: Any) -> Calls:
        """The calls, once the run has given ``result``: what is returned or kept is read."""
        self._read(result)
        for reference, _, readers in self._made.values():
            if reference() is not None:  # in the result, in an attribute of a module
                readers.append(None)
        return self.calls

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self._inside:
            self._read_weights((args, kwargs or {}))
        else:
            self._read((args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def watch_run(
    model: nn.Module,
    norms: Sequence[nn.Module],
    aside: Aside,
    example_inputs: Optional[Tuple] = None,
) -> Calls:
    """The calls of one run of a copy.

    Args:
        model (nn.Module): In evaluation mode.
        norms (Sequence[nn.Module]): The layers to find convolutions for.
        aside (Aside): Of the model.
        example_inputs (tuple, optional): Positional arguments of the model. Without them it
            runs on an image of noise, 1×C×224×224, with C that of its first convolution.
            Where it cannot, and has ``extract_feat`` as OpenMMLab's models do, that runs.

    Returns:
        Calls: Of layers that the run did not come to there are none.

    Raises:
        Exception: Of any kind, where the model cannot run on them.
    """
    if example_inputs is not None:
        return _watch_call(model, norms, '__call__', example_inputs)
    noise = _noise(model)
    try:
        return _watch_call(model, norms, '__call__', (noise,))
    except Exception:  # whatever a detector raises that wants more than an image
        if not hasattr(model, 'extract_feat'):
            raise
    calls = _watch_call(model, norms, 'extract_feat', (noise,))
    calls.weights_read.update(aside.within_reach_of_any())  # what did not run may read them
    return calls


def _watch_call(
    model: nn.Module, norms: Sequence[nn.Module], method: str, inputs: Sequence[Any]
) -> Calls:
    watcher = _Watcher(model, norms)
    with torch.no_grad(), watcher:
        result = getattr(watcher.twin, method)(*inputs)
    return watcher.finish(result)


def _noise(model: nn.Module) -> Tensor:
    conv = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    # A generator of its own leaves the global one as it is. It is on the CPU, whatever the default.
    generator, shape = torch.Generator().manual_seed(0), (1, conv.in_channels, 224, 224)
    return torch.rand(shape, generator=generator, device='cpu').to(conv.weight)

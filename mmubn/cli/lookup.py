"""What a name in a config stands for: the type of a registry, an argument, or a near name."""

import difflib
import functools
import inspect
from typing import Callable, Collection, Iterator, List, Optional, Set

from mmengine.registry import Registry
from torch import nn

from .. import registration

# Where classes come from whose arguments and methods are what they seem.
HOSTS = ('torch.', 'mmengine.', 'mmcv.', 'mmdet.', 'mmpretrain.')


def find_class(node: dict, registry: Registry) -> Optional[Callable]:
    """What a registry builds for a dict with a ``type``; None where it knows no such type."""
    kind = node.get('type')
    if not isinstance(kind, str):
        return kind
    with registry.switch_scope_and_registry(node.get('_scope_')) as found:
        build = found.get(kind)
    if isinstance(build, functools.partial) and build.func is registration.build:
        build = registration.find(*build.args)  # a type of ours, imported by now
    return build


def near_type(node: dict, registry: Registry) -> str:
    """What to say of a ``type`` that a registry does not know, to follow it in a message."""
    with registry.switch_scope_and_registry(node.get('_scope_')) as found:
        known = {*found.module_dict, *registry.module_dict}
    return did_you_mean(str(node['type']), known) or '; is its module in custom_imports?'


def did_you_mean(name: str, known: Collection[str], cutoff: float = 0.6) -> str:
    """``, did you mean '...'?``, or nothing where no known name is near."""
    folded = {other.lower(): other for other in known}
    nearest = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=cutoff)
    return f", did you mean '{folded[nearest[0]]}'?" if nearest else ''


class Arguments:
    """The arguments of a class or function, those that it hands on to base classes included.

    Attributes:
        names (set[str]): All that are known by name.
        required (list[str]): Those without a default value.
        is_open (bool): Any name can be given: all down to the last base have ``**kwargs``, or one
            is written in C.
        hands_on (bool): A class that is not of the hosts has ``**kwargs``. It may use a name
            itself, and hand on the rest.
    """

    def __init__(self, build: Callable) -> None:
        self.names: Set[str] = set()
        self.required: List[str] = []
        self.is_open = True
        self.hands_on = False
        for function in _constructors(build):
            try:
                parameters = inspect.signature(function).parameters.values()
            except ValueError:  # written in C
                break
            if inspect.isclass(build):
                parameters = list(parameters)[1:]
            named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
            if not self.names:  # what a base class needs, this one may give it
                self.required = [p.name for p in named if p.default is p.empty]
            self.names |= {p.name for p in named}
            if not any(p.kind == p.VAR_KEYWORD for p in parameters):
                self.is_open = False
                break
            self.hands_on |= not (function.__module__ or '').startswith(HOSTS)

    def take(self, name: str) -> bool:
        """Whether an argument of this name can be given."""
        return self.is_open or name in self.names


def _constructors(build: Callable) -> Iterator[Callable]:
    if not inspect.isclass(build):
        yield build
        return
    for base in build.__mro__:
        if base in (object, nn.Module):
            return
        if '__init__' in vars(base):
            yield vars(base)['__init__']

"""Which modules a module holds without having registered them, as in a list or a hook."""

import copy
from typing import Dict, List

from torch import nn

_REGISTERED = ('_modules', '_parameters', '_buffers')


class Aside:
    """The modules that are held aside in a model: none of its registered children.

    A copy of the model holds copies of them. So it is the copying that finds them: what it
    does not follow, such as a closure, goes on to hold the modules of the original.

    Args:
        model (nn.Module): One that can be copied.
    """

    def __init__(self, model: nn.Module) -> None:
        known = {id(value): value for value in (*model.parameters(), *model.buffers())}
        # Copying a part again, beside the same children, may change these, as torch.fx's modules
        # do. So it is done to a copy.
        twin = copy.deepcopy(model, dict(known))
        original = {id(ours): theirs for ours, theirs in zip(twin.modules(), model.modules())}
        for module in twin.modules():  # registered children are not looked into
            known.update({id(vars(module)[key]): vars(module)[key] for key in _REGISTERED})
        self._held: Dict[int, List[nn.Module]] = {}
        for module in list(twin.modules()):
            memo = dict(known)
            copy.deepcopy(module, memo)
            found = [original[key] for key in memo if key in original and key != id(module)]
            self._held[id(original[id(module)])] = found

    def holds(self, module: nn.Module) -> bool:
        """Whether any other module holds this one aside, itself and not in a module around it."""
        return any(held is module for modules in self._held.values() for held in modules)

    def within_reach(self, *modules: nn.Module) -> Dict[int, nn.Module]:
        """All modules that these can call or read, themselves among them, by id."""
        found: Dict[int, nn.Module] = {}
        todo = [*modules]
        while todo:
            module = todo.pop()
            if id(module) not in found:
                found[id(module)] = module
                todo += [*module.children(), *self._held.get(id(module), ())]
        return found

    def within_reach_of_any(self) -> Dict[int, nn.Module]:
        """All modules that one can call or read which holds them aside, by id."""
        return self.within_reach(*(held for modules in self._held.values() for held in modules))

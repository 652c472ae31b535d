"""A break in what torch.compile compiles: a step of eager mode.

A module of its own, imported at the first such step, as ``torch.compiler.disable`` imports torch's
compiler: over a second.
"""

import torch

from .ubn import ubn

ubn_not_compiled = torch.compiler.disable(ubn)

"""The layers that the tests of mmubn.inference prepare, and a dtype that not every torch has."""

import pytest
import torch

from mmubn import layers

KINDS = [kind for kind in layers.__all__ if kind != 'SyncUBN']  # which is UBN there

# torch 2.1 has no convolution of float16 on a CPU.
HALF = pytest.param(torch.float16, marks=pytest.mark.newer_torch('no float16 on a CPU'))

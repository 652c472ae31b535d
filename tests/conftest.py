"""Fixtures that several test modules share."""

import os
from pathlib import Path

# One thread: the tensors are small, and threads that wait for one another spin. Read when
# torch is imported, here and in the subprocesses of the tests.
os.environ.setdefault('OMP_NUM_THREADS', '1')
# The Triton kernels run in Triton's interpreter, on the CPU. Read when triton is imported.
os.environ.setdefault('TRITON_INTERPRET', '1')

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope='session')
def real_data() -> Path:
    """The folder of real data; the test is skipped where there is none."""
    folder = os.environ.get('MMUBN_DATA')
    if folder is None:
        pytest.skip('no real data: MMUBN_DATA names no folder')
    return Path(folder)

"""No thread of the process group outlives it."""

import os

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from mmubn.cli.leave_group import leave_group


def threads() -> int:
    return len(os.listdir('/proc/self/task'))


def train() -> None:
    net = DistributedDataParallel(nn.Linear(4, 4))
    net.itself = [net]  # as mmengine's Runner and its hooks do
    net(torch.rand(2, 4)).sum().backward()
    distributed.broadcast_object_list([{'a': 1}])


@pytest.mark.skipif(not os.path.isdir('/proc/self/task'), reason='counts threads in /proc')
def test_a_parallel_model_in_a_cycle_holds_no_thread(tmp_path):
    nn.Linear(4, 4)(torch.rand(2, 4)).sum().backward()  # what autograd starts stays
    before = threads()
    store = f'file://{tmp_path}/store'
    distributed.init_process_group('gloo', init_method=store, rank=0, world_size=1)
    train()
    assert threads() > before
    leave_group()
    assert not distributed.is_initialized()
    assert threads() <= before


def test_without_a_group_nothing_happens():
    leave_group()

"""UBN under DistributedDataParallel: ranks whose gates differ, and one with an empty batch."""

import functools

import pytest
import torch
from processes import in_processes
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mmubn.layers import UBN

all_reduce_params = pytest.importorskip('mmengine.dist').all_reduce_params

STEPS = 6


def batch_of(case, rank, step):
    """Noise that shuts the gate of rank 0, an offset that keeps that of rank 1 open.

    In the case ``empty`` every second batch of rank 1 has no images.
    """
    size = 0 if case == 'empty' and rank == 1 and step % 2 else 6
    offset = 3.0 if rank == 1 else 0.0
    return torch.randn(size, 3, 9, 9) + offset


def train(case, rank, world):
    """Trains and returns what the test looks at; a step that hangs runs into the limit."""
    torch.manual_seed(0)
    norm = UBN(3, fct_momentum=0.7, fct_warmup=0)
    net = nn.Sequential(norm, nn.Conv2d(3, 4, 3), UBN(4, fct_warmup=0), nn.ReLU())
    model = DistributedDataParallel(
        net, device_ids=None, find_unused_parameters=False, broadcast_buffers=False
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(1 + rank)
    gates, has_gradient = [], []
    start = [p.detach().clone() for p in model.parameters()]
    for step in range(STEPS):
        optimizer.zero_grad(set_to_none=True)
        ((model(batch_of(case, rank, step)) - 1).square().sum() / 1000).backward()
        has_gradient += [p.grad is not None for p in model.parameters()]
        optimizer.step()
        gates.append(bool(norm.batch_statistics_used))
    moved = [not torch.equal(a, b) for a, b in zip(start, model.parameters())]
    state = {key: value.clone() for key, value in net.state_dict().items()}
    all_reduce_params(net.buffers(), op='mean')  # as mmengine's SyncBuffersHook does
    return dict(
        gates=gates,
        has_gradient=has_gradient,
        moved=moved,
        state=state,
        averaged=net.state_dict(),
        parameters=[p.detach() for p in model.parameters()],
    )


@pytest.mark.parametrize('case', ['full', 'empty'])
def test_ranks_whose_gates_differ_train_alike(tmp_path, case):
    first, second = in_processes(functools.partial(train, case), 2, tmp_path)
    differ = [a != b for a, b in zip(first['gates'], second['gates'])]
    assert sum(differ) >= STEPS - 2
    assert all(second['gates'])
    for result in (first, second):
        assert all(result['has_gradient'])
        assert all(result['moved'])
        assert all(p.isfinite().all() for p in result['parameters'])
    assert all(torch.equal(a, b) for a, b in zip(first['parameters'], second['parameters']))
    tracked = [int(result['state']['0.num_batches_tracked']) for result in (first, second)]
    assert tracked == [sum(first['gates']), STEPS // 2 if case == 'empty' else STEPS]

    # Running statistics and similarity are each rank's own until the hook averages them.
    for key in ('0.running_mean', '0.running_similarity'):
        own = [result['state'][key] for result in (first, second)]
        assert not torch.equal(*own)
        for result in (first, second):
            torch.testing.assert_close(result['averaged'][key], sum(own) / 2)

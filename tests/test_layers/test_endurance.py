"""Ten thousand steps leave the memory as it was and the log empty."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from mmubn.layers import UBN, SyncUBN


def resident_bytes() -> int:
    """Of this process, as Linux counts them."""
    pages = int(Path('/proc/self/statm').read_text().split()[1])
    return pages * 4096


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/statm').exists(), reason='memory is read from /proc')
@pytest.mark.parametrize('layer', [UBN, SyncUBN])
def test_memory_stays_flat_and_nothing_is_said(layer, caplog, capfd):
    net = nn.Sequential(layer(3), nn.Conv2d(3, 8, 3), layer(8), nn.ReLU(), nn.Conv2d(8, 2, 3))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for step in range(10_000):
            x = torch.randn(4 + step % 3, 3, 12, 12) + step % 5  # the shapes change
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
            if step == 1000:
                before = resident_bytes()
    assert resident_bytes() - before < 4 << 20
    assert caplog.text == ''
    assert capfd.readouterr() == ('', '')
    assert all(value.isfinite().all() for value in net.state_dict().values())

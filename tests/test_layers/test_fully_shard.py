"""The layers under FSDP2: made on meta, sharded, filled by reset_parameters, trained."""

import pytest
import torch
from processes import in_processes
from torch import nn

from mmubn import layers

fsdp = pytest.importorskip('torch.distributed.fsdp')
if not hasattr(fsdp, 'fully_shard'):
    pytest.skip('fully_shard came with torch 2.6', allow_module_level=True)

CHANNELS = 5  # not the same number for each of two processes


def shard(rank, world):
    from torch.distributed.device_mesh import init_device_mesh

    mesh, results = init_device_mesh('cpu', (world,)), {}
    for kind in layers.__all__:
        with torch.device('meta'):
            net = nn.Sequential(nn.Conv2d(3, CHANNELS, 3), getattr(layers, kind)(CHANNELS))
        fsdp.fully_shard(net, mesh=mesh).to_empty(device='cpu')
        for module in net:
            module.reset_parameters()
        full = {
            name: value.full_tensor() if hasattr(value, 'full_tensor') else value.clone()
            for name, value in net[1].state_dict().items()
        }
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        losses, images = [], torch.randn(4, 3, 8, 8)
        for _ in range(3):
            optimizer.zero_grad()
            loss = net(images).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        results[kind] = full, losses
    return results


def test_reset_parameters_of_sharded_layers(tmp_path):
    for results in in_processes(shard, 2, tmp_path):
        for kind, (state, losses) in results.items():
            assert losses[-1] < losses[0]
            for name, value in getattr(layers, kind)(CHANNELS).state_dict().items():
                if kind == 'BNET' and name in ('kernel', 'bias'):  # drawn at random
                    assert 0.1 < state[name].abs().max() <= 1 / 3
                else:
                    assert torch.equal(state[name], value), (kind, name)

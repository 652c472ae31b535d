"""The layers under FSDP2: made on meta, sharded, filled, trained, given a BatchNorm checkpoint."""

import pytest
import torch
from processes import in_processes
from torch import nn

import mmubn
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
        results[kind] = full, losses, with_batch_norms_checkpoint(net, mesh)
    return results


def with_batch_norms_checkpoint(net, mesh):
    """The outputs in evaluation of a sharded network and of the BatchNorm network it loads."""
    from torch.distributed.tensor import distribute_tensor

    torch.manual_seed(0)  # the same network in every process
    with_batch_norm = nn.Sequential(nn.Conv2d(3, CHANNELS, 3), nn.BatchNorm2d(CHANNELS))
    nn.init.normal_(with_batch_norm[1].weight)
    with_batch_norm(torch.randn(4, 3, 8, 8) + 1)
    sharded = net.state_dict()
    checkpoint = {
        name: distribute_tensor(value.detach(), mesh, sharded[name].placements)
        if hasattr(sharded[name], 'placements')
        else value.clone()
        for name, value in with_batch_norm.state_dict().items()
    }
    images = torch.randn(4, 3, 8, 8)
    outputs = [with_batch_norm.eval()(images).detach()]
    for assign in (False, True):
        net.load_state_dict(checkpoint, assign=assign)
        outputs.append(net.eval()(images).detach())
    return outputs


def test_sharded_layers(tmp_path):
    for results in in_processes(shard, 2, tmp_path):
        for kind, (state, losses, (expected, *loaded)) in results.items():
            assert losses[-1] < losses[0]
            for outputs in loaded:
                torch.testing.assert_close(outputs, expected, msg=kind)
            for name, value in getattr(layers, kind)(CHANNELS).state_dict().items():
                if kind == 'BNET' and name in ('kernel', 'bias'):  # drawn at random
                    assert 0.1 < state[name].abs().max() <= 1 / 3
                else:
                    assert torch.equal(state[name], value), (kind, name)


def test_conversion_comes_before_sharding(one_process):
    """The first step ended in 'got mixed torch.Tensor and DTensor'."""
    net = nn.Sequential(nn.Conv2d(3, CHANNELS, 3), nn.BatchNorm2d(CHANNELS))
    fsdp.fully_shard(net, mesh=torch.distributed.device_mesh.init_device_mesh('cpu', (1,)))
    with pytest.raises(ValueError, match='convert the model before fully_shard'):
        mmubn.convert_norm(net, dict(type='UBN'))

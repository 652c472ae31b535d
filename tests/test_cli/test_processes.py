"""Processes that cannot be started."""

import pytest
import torch
from mmengine.config import Config
from told import told

from mmubn.cli import processes


def test_torchrun_without_a_launcher(monkeypatch):
    cfg = Config(dict(launcher='none'))
    monkeypatch.setenv('WORLD_SIZE', '2')
    processes.start_processes(cfg)  # a variable that other programs set too
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'none')
    assert told(processes.start_processes, cfg) == (
        '--launcher: torchrun started several processes; add pytorch'
    )
    monkeypatch.setenv('WORLD_SIZE', '1')
    processes.start_processes(cfg)


@pytest.mark.parametrize(('count', 'starts'), [('4', True), ('8', False)])
def test_more_processes_than_gpus(monkeypatch, count, starts):
    started = []
    monkeypatch.setattr(processes, 'get_device', lambda: 'cuda')
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 4)
    monkeypatch.setattr(processes, 'init_dist', started.append)
    monkeypatch.setenv('RANK', '0')
    monkeypatch.setenv('LOCAL_WORLD_SIZE', count)
    cfg = Config(dict(launcher='pytorch'))
    if starts:
        processes.start_processes(cfg)
        assert started == ['pytorch']
        return
    assert told(processes.start_processes, cfg) == (
        '--launcher pytorch: 8 processes on this machine, where torch sees 4 GPUs; start one '
        'process for each GPU'
    )


def test_each_job_of_slurm_has_a_port_of_its_own(monkeypatch):
    """The one port of mmengine would not let two jobs share a machine."""
    ports, environment = [], {}
    monkeypatch.setattr(processes, 'get_device', lambda: 'cuda')
    monkeypatch.setattr(processes, 'init_dist', lambda _: ports.append(environment['MASTER_PORT']))
    monkeypatch.setattr(processes.os, 'environ', environment)
    cfg = Config(dict(launcher='slurm'))
    assert told(processes.start_processes, cfg) == (
        '--launcher slurm: start by srun or tools/slurm_train.sh'
    )
    for job in ('123456', '123457'):
        environment.clear()
        environment.update(SLURM_PROCID='0', SLURM_JOB_ID=job)
        processes.start_processes(cfg)
    environment['MASTER_PORT'] = '4000'
    processes.start_processes(cfg)
    assert ports == ['23456', '23457', '4000']

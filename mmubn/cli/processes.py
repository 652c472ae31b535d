"""Several processes, with GPUs or without."""

import os
from datetime import timedelta
from typing import Any, Callable, List

import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import broadcast_object_list, init_dist, is_main_process

from .errors import CommandError


def start_processes(cfg: Config) -> None:
    """Joins the process group that ``cfg.launcher`` asks for; mmengine then keeps it.

    Without a GPU the group is gloo's. mmengine would set a CUDA device and give one to
    DistributedDataParallel all the same, so both are done here.

    Args:
        cfg (Config): On a CPU it gets a ``model_wrapper_cfg`` without device.

    Raises:
        CommandError: A launcher other than 'pytorch' without a GPU, 'pytorch' outside of
            torchrun, 'slurm' outside of Slurm, none inside of torchrun, or more processes than
            GPUs.
    """
    if cfg.launcher == 'none':
        # Each process would train by itself, in the same folder.
        if 'TORCHELASTIC_RUN_ID' in os.environ and int(os.environ['WORLD_SIZE']) > 1:
            raise CommandError('--launcher: torchrun started several processes; add pytorch')
        return
    if cfg.launcher == 'pytorch' and 'RANK' not in os.environ:
        raise CommandError('--launcher pytorch: start by torchrun or tools/dist_train.sh')
    settings = cfg.get('env_cfg', {}).get('dist_cfg', {})
    device = get_device()
    if device != 'cpu':
        here, devices = int(os.environ.get('LOCAL_WORLD_SIZE', 1)), torch.cuda.device_count()
        if cfg.launcher == 'pytorch' and device == 'cuda' and here > devices:
            raise CommandError(
                f'--launcher pytorch: {here} processes on this machine, where torch sees {devices} '
                'GPUs; start one process for each GPU'
            )
        if cfg.launcher == 'slurm':
            if 'SLURM_PROCID' not in os.environ:
                raise CommandError('--launcher slurm: start by srun or tools/slurm_train.sh')
            # mmengine's is 29500 for each job, so two could not share a machine.
            port = 20000 + int(os.environ['SLURM_JOB_ID']) % 10000
            os.environ.setdefault('MASTER_PORT', str(port))
        init_dist(cfg.launcher, **settings)
        return
    if cfg.launcher != 'pytorch':
        raise CommandError(f'--launcher {cfg.launcher} needs a GPU; on a CPU use pytorch')
    timeout = settings.get('timeout')
    dist.init_process_group('gloo', timeout=timeout and timedelta(seconds=timeout))
    wrapper = dict(
        type='MMDistributedDataParallel',
        broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False),
    )
    cfg.model_wrapper_cfg = {**(cfg.get('model_wrapper_cfg') or wrapper), 'device_ids': None}


def on_main_process(check: Callable[[], Any]) -> Any:
    """Runs ``check`` once; every process gets what it returns, or its :class:`CommandError`."""
    outcome: List[Any] = [None, None]
    if is_main_process():
        try:
            outcome[0] = check()
        except CommandError as error:
            outcome[1] = str(error)
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise CommandError(outcome[1])
    return outcome[0]

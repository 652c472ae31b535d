"""Runs a function in several processes that form a gloo group."""

import collections
import functools
from datetime import timedelta

import torch
from torch import distributed, multiprocessing

from mmubn.cli.leave_group import leave_group

LIMIT = timedelta(seconds=60)  # what hangs fails


class Traffic:
    """Counts the collectives inside the context, and the numbers that go into them."""

    def __enter__(self):
        self.calls = collections.Counter()
        self.numbers = collections.Counter()
        self.originals = {name: getattr(distributed, name) for name in ('all_gather', 'all_reduce')}
        for name, function in self.originals.items():
            setattr(distributed, name, functools.partial(self.count, name, function))
        return self

    def count(self, name, function, *args, **kwargs):
        self.calls[name] += 1
        self.numbers[name] += args[name == 'all_gather'].numel()
        return function(*args, **kwargs)

    def __exit__(self, *error):
        for name, function in self.originals.items():
            setattr(distributed, name, function)


def in_processes(function, world, folder):
    """What ``function(rank, world)`` returns in each of ``world`` processes.

    They are forked from a server that has the packages imported, which takes longer
    than most tests.
    """
    multiprocessing.get_context('forkserver').set_forkserver_preload(['mmubn'])
    multiprocessing.start_processes(
        _run, (function, world, str(folder)), nprocs=world, start_method='forkserver'
    )
    return [torch.load(folder / f'{rank}.pt') for rank in range(world)]


def _run(rank, function, world, folder):
    torch.set_num_threads(1)
    distributed.init_process_group(
        'gloo', f'file://{folder}/rendezvous', timeout=LIMIT, rank=rank, world_size=world
    )
    torch.save(function(rank, world), f'{folder}/{rank}.pt')
    leave_group()

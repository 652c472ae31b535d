"""A process that trains in a work directory, as far as the lock of the directory goes."""

import multiprocessing
import os
import signal
import time
from contextlib import contextmanager

from mmubn.cli.work_dir_lock import locked

FORK = multiprocessing.get_context('fork')


def _hold(work_dir, started):
    with locked(work_dir):
        worker = FORK.Process(target=time.sleep, args=(60,))  # a data loader's
        worker.start()
        started.put(worker.pid)
        time.sleep(60)


@contextmanager
def held(work_dir):
    """Gives the process, and the number of its worker."""
    started = FORK.Queue()
    process = FORK.Process(target=_hold, args=(work_dir, started))
    process.start()
    worker = started.get(timeout=60)
    try:
        yield process, worker
    finally:
        process.kill()
        os.kill(worker, signal.SIGKILL)
        process.join()

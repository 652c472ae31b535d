"""Leaves the process group before the interpreter ends."""

import gc

import torch.distributed as dist

# Imported while there is a group, it would hold that in its default arguments for ever.
import torch.distributed.nn.functional  # noqa: F401


def leave_group() -> None:
    """Destroys the process group, if there is one, and waits for its threads.

    Gloo's threads let go of the last collective's tensors a little after it is done, and
    need Python's lock for that. Python ends a thread that asks for the lock while the
    interpreter shuts down, and C++ then aborts the process (SIGABRT, "terminate called
    without an active exception"): a finished training would end as a failed one. The
    threads live as long as anything holds the group, as a parallel model in a reference
    cycle does. So call this where no variable holds such a model any more.

    Source: pytorch/pytorch#179291 and #190489.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    group = dist.group.WORLD
    # Held to the last: freed by this name, they wait for their threads without the lock.
    backends = [group._get_backend(device) for device in group._device_types]
    del group
    dist.destroy_process_group()
    gc.collect()
    del backends

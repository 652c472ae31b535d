"""Time and memory of steps that run side by side. Needs torch alone.

A step is a function that returns a generator: it works up to each ``yield`` and yields
the name of the phase that has just ended, such as ``'forward'``.
"""

import time
from statistics import median
from typing import Any, Callable, Dict, Iterator, List, Optional

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

Step = Callable[[], Iterator[str]]
Laps = Dict[str, float]  # phase -> milliseconds


class CpuClock:
    """Times one run of a step by the wall clock."""

    def laps(self, step: Step) -> Laps:
        """Milliseconds of each phase."""
        laps, last = {}, time.perf_counter()
        for phase in step():
            now = time.perf_counter()
            laps[phase] = 1e3 * (now - last)
            last = now
        return laps


class CudaClock:
    """Times runs of a step by CUDA events, on a device that is never short of work.

    Before each run the device idles for longer than the host needs to enqueue the run,
    so the gaps between small kernels are those of the device. What the host needs is
    reported beside, as the phase ``enqueue``. The second level cache is flushed before
    each run, as ``triton.testing.do_bench`` does.

    Args:
        device (torch.device): The device.
        iterations (int): Runs of a sample, which is their mean. Default: 5.
    """

    def __init__(self, device: torch.device, iterations: int = 5) -> None:
        self.iterations = iterations
        self._flush = torch.empty(256 << 20, dtype=torch.int8, device=device)
        self._enqueue_ms: Dict[Step, float] = {}
        trial = 10_000_000
        torch.cuda._sleep(trial)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.cuda._sleep(trial)
        end.record()
        torch.cuda.synchronize()
        self._cycles_per_ms = trial / start.elapsed_time(end)

    def laps(self, step: Step) -> Laps:
        """Milliseconds of each phase and of the host, ``enqueue``."""
        if step not in self._enqueue_ms:
            self._run(step, hold_ms=0)  # compiles and tunes
            # Without the idling, which a step that waits for the device would sit through;
            # the longest of steps wait, or are long enough for the host to run ahead.
            self._enqueue_ms[step] = self._run(step, hold_ms=0)['enqueue']
        laps = self._run(step, min(1.2 * self._enqueue_ms[step], 5.0))
        return {**laps, 'enqueue': self._enqueue_ms[step]}

    def _run(self, step: Step, hold_ms: float) -> Laps:
        torch.cuda.synchronize()
        phases: List[str] = []
        events = []
        start = time.perf_counter()
        for _ in range(self.iterations):
            if hold_ms:
                torch.cuda._sleep(int(hold_ms * self._cycles_per_ms))
            self._flush.zero_()
            events.append([_record()])
            phases = []
            for phase in step():
                events[-1].append(_record())
                phases.append(phase)
        enqueue = 1e3 * (time.perf_counter() - start) / self.iterations
        torch.cuda.synchronize()
        laps = {
            phase: sum(run[i].elapsed_time(run[i + 1]) for run in events) / self.iterations
            for i, phase in enumerate(phases)
        }
        return {**laps, 'enqueue': enqueue}


class CudaStepClock:
    """Times whole training steps, the host's share included: several without a pause."""

    def __init__(self, iterations: int = 3) -> None:
        self.iterations = iterations

    def laps(self, step: Step) -> Laps:
        """Milliseconds of each phase on the device, whose sum is the time of a step, and
        ``enqueue``: what the host takes until a step is enqueued, waits for the device included.
        """
        torch.cuda.synchronize()
        begin = time.perf_counter()
        events, phases = [_record()], []
        for _ in range(self.iterations):
            for phase in step():
                events.append(_record())
                phases.append(phase)
        enqueue = 1e3 * (time.perf_counter() - begin) / self.iterations
        torch.cuda.synchronize()
        laps = dict.fromkeys(phases, 0.0)
        for phase, start, end in zip(phases, events, events[1:]):
            laps[phase] += start.elapsed_time(end) / self.iterations
        return {**laps, 'enqueue': enqueue}


def _record() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def race(
    steps: Dict[str, Step],
    clock: Any,
    rounds: int,
    warmup: int,
    tell: Callable[[str], None],
) -> Dict[str, List[Laps]]:
    """Times steps in turn, round after round, so that all see the same disturbances.

    Every round begins with another step, as each inherits the caches of the one before.

    Args:
        steps (dict): Name -> step.
        clock: A clock of this module.
        rounds (int): Measured rounds.
        warmup (int): Rounds before, which do not count.
        tell: Takes a word on the progress.

    Returns:
        dict: Name -> the laps of each round, in order.
    """
    names = list(steps)
    laps: Dict[str, List[Laps]] = {name: [] for name in names}
    for turn in range(-warmup, rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            tell(f'warm-up, {name}' if turn < 0 else f'round {turn + 1}/{rounds}, {name}')
            lap = clock.laps(steps[name])
            if turn >= 0:
                laps[name].append(lap)
    return laps


def peak_bytes(step: Step, device: torch.device) -> Optional[int]:
    """Most CUDA memory that one run of a step allocates beyond what was there; None on a CPU."""
    if device.type != 'cuda':
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in step():
        pass
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def launches(step: Step, device: torch.device) -> int:
    """What one run of a step asks of the device, by torch's profiler.

    Args:
        step: The step.
        device (torch.device): The device.

    Returns:
        int: Kernels, copies and fills on a CUDA device. On a CPU torch's operators that called
        no other, views among them; code that is not torch's is not seen.
    """
    events = _profile(step, device)
    if device.type == 'cuda':
        return sum(map(_is_of_device, events))
    return sum(not event.cpu_children for event in events)


def kernel_us(step: Step, device: torch.device, runs: int = 7) -> Dict[str, float]:
    """Microseconds of each kernel of a step on a CUDA device, by torch's profiler.

    The second level cache is flushed before each run.

    Args:
        step: The step.
        device (torch.device): A CUDA device.
        runs (int): Runs, of which the median counts. Default: 7.

    Returns:
        dict: Name -> microseconds, those of several launches added up.
    """
    flush = torch.empty(256 << 20, dtype=torch.int8, device=device)
    totals: List[Dict[str, float]] = []
    for _ in range(runs):
        flush.zero_()
        total: Dict[str, float] = {}
        for event in _profile(step, device):
            if _is_of_device(event):
                total[event.name] = total.get(event.name, 0.0) + event.time_range.elapsed_us()
        totals.append(total)
    return {name: median(total.get(name, 0.0) for total in totals) for name in totals[0]}


def _is_of_device(event: Any) -> bool:
    """Whether it is a kernel, a copy or a fill, and not a span that torch.compile names there."""
    is_span = getattr(event, 'is_user_annotation', False)  # torch 2.1 does not say
    return event.device_type == DeviceType.CUDA and not is_span


def _profile(step: Step, device: torch.device) -> List[Any]:
    """The events of one run."""
    kinds = [ProfilerActivity.CPU]
    if device.type == 'cuda':
        kinds.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with profile(activities=kinds) as seen:
        for _ in step():
            pass
        if device.type == 'cuda':
            torch.cuda.synchronize()
    return seen.events()


def saved_bytes(forward: Callable[[], Tensor], module: nn.Module) -> int:
    """Bytes that the graph of ``forward()`` keeps for the backward pass.

    Counted are the distinct storages of all saved tensors and of tensors that autograd
    Functions keep as attributes, a view as all of its storage. The parameters and
    buffers of ``module`` live on anyway and do not count; the input does.

    Args:
        forward: Returns the output, a tensor with a graph.
        module (nn.Module): What owns the parameters and buffers.

    Returns:
        int: Bytes.
    """
    storages: Dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return tensor.detach()  # without its graph, which would own itself

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = forward()
    nodes, seen = [output.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes.extend(following for following, _ in node.next_functions)
        for value in getattr(node, '__dict__', {}).values():
            if isinstance(value, Tensor):
                keep(value)
    for tensor in (*module.parameters(), *module.buffers()):
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in storages.values())

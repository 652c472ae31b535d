"""What the host pays for a step of a layer on a GPU: Python, torch and Triton. Needs no GPU.

The kernels are compiled for sm_90 and launched by a driver that does nothing, on tensors of the
CPU. It stands for Triton's own, whose interface is Triton's to change: written for Triton 3.6.
"""

from statistics import median
from typing import Any, Dict, List
from unittest import mock

import torch
from torch import nn

from ..ops import backend
from .measure import CpuClock, race
from .norm import WARMUP
from .subjects import KINDS, layer_step, with_norm

# So small that BatchNorm, which computes, has next to nothing to compute.
SHAPE = (2, 16, 8, 8)


class Driver:
    """Triton's driver for an H100, as far as a launch asks for it."""

    class utils:
        """What loads a kernel."""

        load_binary = staticmethod(lambda *_: (0, 0, 0, 0, 1024))
        get_device_properties = staticmethod(lambda _: dict(max_shared_mem=232448))

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget('cuda', 90, 32)
        self.launches = 0

    def launcher_cls(self, *_: Any) -> Any:
        """What is called for each launch."""

        def launch(*_: Any) -> None:
            self.launches += 1

        return launch

    def get_current_target(self) -> Any:
        """An H100."""
        return self.target

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, _: int) -> int:
        """The only one."""
        return 0


def host_us(rounds: int = 300) -> Dict[str, List[float]]:
    """Microseconds of the host for a step, by the type of the layer.

    Args:
        rounds (int): Steps of each type, of which the median counts. Default: 300.

    Returns:
        dict: Type in lower case, ``bn`` first -> forward, backward, launches.
    """
    from triton.runtime import driver

    torch.set_num_threads(1)
    own = Driver()
    x = torch.randn(SHAPE, dtype=torch.bfloat16, requires_grad=True)
    found = {}
    # Without a launch Y stays as it was allocated, which nobody reads.
    with (
        mock.patch.object(driver, '_active', own),
        mock.patch.object(type(backend.TRITON), 'why_not', return_value=''),
        mock.patch.dict(backend._BY_DEVICE, cpu=backend.TRITON),
    ):
        for kind in ('bn', *KINDS):
            layer = with_norm(nn.BatchNorm2d(SHAPE[1]), kind)
            step = layer_step(layer, x, torch.randn_like(x))
            own.launches = 0
            laps = race({kind: step}, CpuClock(), rounds, WARMUP, lambda _: None)[kind]
            times = (1e3 * median(lap[phase] for lap in laps) for phase in laps[0])
            found[kind] = [*times, own.launches // (rounds + WARMUP)]
    return found


def host_table(found: Dict[str, List[float]]) -> str:
    """What :func:`host_us` found, for a terminal."""
    lines = [f'{"layer":8}{"forward us":>12}{"backward us":>13}{"launches":>10}']
    for kind, (forward, backward, launches) in found.items():
        lines.append(f'{kind:8}{forward:>12.0f}{backward:>13.0f}{launches:>10}')
    return '\n'.join(lines)

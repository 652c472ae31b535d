"""Steps of layers by the kernels' PTX: run_ptx.py ARCHITECTURE DTYPE [--every-layer].

The kernels are compiled for an NVIDIA GPU that is not there (80, 90), and :mod:`ptx` runs them on
tensors of the CPU. Prints a line for each step, and fails at the first that differs from torch's.
"""

import sys
from pathlib import Path
from typing import Any, Iterator, Tuple
from unittest import mock

import ptx
import torch
from compile_kernels import layers
from one_step import assert_same, copy, random_buffers, run_step
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager

from mmubn.benchmark.host import Driver
from mmubn.ops import Parameters
from mmubn.ops.backend import TORCH, TRITON
from mmubn.ops.triton_backend import Tiles

SHAPE = (3, 20, 9, 11)
FORMATS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}


class PtxDriver(Driver):
    """As Triton's, but a launch runs the PTX."""

    def __init__(self, architecture: int) -> None:
        super().__init__()
        self.target = GPUTarget('cuda', architecture, 32)

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """What is called for each launch."""
        path = get_cache_manager(metadata.hash).get_file(f'{metadata.name}.ptx')
        program = ptx.Program(Path(path).read_text())
        kinds = source.signature.values()

        def launch(x: int, y: int, z: int, *rest: Any) -> None:
            given = rest[-len(kinds) :]
            given = [value for value, kind in zip(given, kinds) if kind != 'constexpr']
            try:
                program.run((x, y), given, metadata.shared)
            except ptx.Fault as fault:
                raise RuntimeError(f'{metadata.name}: {fault}') from fault

        return launch


# Those that are not the chosen ones.
OTHER_TILES = Tiles(programs=1, ahead=2, unroll=3)


def cases(dtype: torch.dtype) -> Iterator[Tuple]:
    """Name, tiles, empty parameters, settings, ranks: every layer; UBN with other k and tiles."""
    channels = SHAPE[1]
    for name, *layer in layers(channels, 3, dtype):
        yield name, Tiles(), *layer
        if name == 'UBN':
            yield 'UBN, other tiles', OTHER_TILES, *layer
    for size in (1, 5, 7):
        name, *layer = next(layers(channels, size, dtype))
        yield f'{name}, kernel {size}', Tiles(), *layer


def main(architecture: str, dtype: str, *options: str) -> None:
    """See the module."""
    dtype = getattr(torch, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    # Y and dX are rounded to the dtype at the end.
    rounding = max(torch.finfo(dtype).eps, 1000 * torch.finfo(wide).eps)
    chosen = cases(wide) if options else [next(cases(wide))]
    with mock.patch.object(driver, '_active', PtxDriver(int(architecture))):
        for name, tiles, empty, settings, ranks in chosen:
            TRITON.tiles = tiles
            for layout, memory_format in FORMATS.items():
                torch.manual_seed(0)
                x, dy = (
                    torch.randn(SHAPE).to(dtype).contiguous(memory_format=memory_format) + shift
                    for shift in (3, 0)
                )
                values = [None if value is None else torch.randn_like(value) for value in empty]
                parameters = Parameters(*values)
                buffers = random_buffers(SHAPE[1], wide)
                steps = []
                for backend in (TRITON, TORCH):
                    moved = copy(buffers)
                    given = x, dy, parameters, moved, settings
                    torch.manual_seed(0)
                    step = run_step(backend, *given, stride=settings.stride, ranks=ranks)
                    steps.append({**step, **moved._asdict()})
                assert_same(*steps, rtol=rounding, atol=rounding)
                print(name, layout, flush=True)


if __name__ == '__main__':
    main(*sys.argv[1:])

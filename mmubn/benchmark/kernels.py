"""UBN's Triton kernels one by one: how near each comes to a copy, and which tiles would be faster.

Needs torch and Triton alone.
"""

import os
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from typing import Callable, Dict, Iterator, List, Sequence, Tuple

import torch
from torch import Tensor, nn

from ..ops import Buffers, Parameters, Settings
from ..ops.interface import Backend, Sums
from ..ops.triton_backend import Tiles, TritonBackend
from ..ops.utils import statistics_dtype
from . import measure
from .norm import LAYOUTS
from .rows import Row

COLUMNS = (
    *('date', 'commit', 'device', 'torch', 'triton', 'mmubn'),
    *('shape', 'dtype', 'layout', *Tiles._fields, 'kernel', 'median_us', 'of_copy'),
)
# One thing at a time is other than in the tiles that are chosen.
OTHER_TILES = [
    *(Tiles(values=values, warps=warps) for values in (128, 256, 512) for warps in (2, 4, 8)),
    *(Tiles(channels=channels) for channels in (32, 128)),
    Tiles(columns=64),
    *(Tiles(rows=rows) for rows in (4, 16)),
    *(Tiles(programs=programs) for programs in (512, 2048, 4096)),
]
OTHER_TILES.remove(Tiles())
# The kernels in their order, with their reads and writes of tensors of X's size.
PASSES = dict(
    **dict(moments=1, squared_sums=1, finish_row=0, decide=0, write_output=2),
    **dict(sum_pixels=2, reduce_sums=0, write_input_gradient=3),
)
_CONVOLUTIONS = ('write_output', 'sum_pixels', 'write_input_gradient')

Setting = Tuple[Tuple[int, ...], str, str]  # shape, dtype, layout


def ubn_step(backend: Backend, x: Tensor, dy: Tensor) -> Tuple[Tensor, Tensor, Sums]:
    """A training step of UBN by a backend, k = 3: Y, dX and what holds the other gradients."""
    channels = x.shape[1]
    zeros = x.new_zeros(channels, dtype=statistics_dtype(x.dtype))
    kernel = torch.full_like(zeros, 0.1)[:, None, None, None].repeat(1, 1, 3, 3)
    parameters = Parameters(zeros + 1, kernel, zeros, zeros, zeros, zeros)
    count, gate = zeros.new_zeros((), dtype=torch.int64), zeros.new_zeros((), dtype=torch.bool)
    buffers = Buffers(zeros.clone(), zeros + 1, count, zeros[0].clone(), gate)
    settings = Settings(fct=0.15, warmup=10**9)
    image_mean, row = backend.measure(x, parameters.center_weight, 1)
    y, image_mean, statistics = backend.normalize(
        x, image_mean, row[None], parameters, buffers, settings
    )
    sums = backend.backward_sums(x, dy, image_mean, statistics, parameters, settings)
    d_statistics = sums.d_statistics
    dx, _ = backend.backward_input(x, dy, statistics, d_statistics, parameters, settings, sums)
    return y, dx, sums


def _step(setting: Setting, tiles: Tiles, device: torch.device) -> measure.Step:
    backend, inputs = TritonBackend(tiles), [_random(setting, device, seed) for seed in range(2)]

    def step() -> Iterator[str]:
        ubn_step(backend, *inputs)
        yield 'step'

    return step


def _random(setting: Setting, device: torch.device, seed: int) -> Tensor:
    shape, dtype, layout = setting
    value = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.5
    return value.to(device, getattr(torch, dtype)).contiguous(memory_format=LAYOUTS[layout])


def compile_all(every: Sequence[Setting], tiles: Sequence[Tiles], device: torch.device) -> None:
    """Fills Triton's cache, a process a core: one alone would compile for many minutes."""
    workers = min(os.cpu_count() or 1, 12)
    with ProcessPoolExecutor(workers, mp_context=get_context('spawn')) as pool:
        list(pool.map(_compile, *zip(*product(every, tiles, [device]))))


def _compile(setting: Setting, tiles: Tiles, device: torch.device) -> None:
    for _ in _step(setting, tiles, device)():
        pass


def time_kernels(
    run: Row,
    setting: Setting,
    tiles: Sequence[Tiles],
    device: torch.device,
    kernel_us: Callable[..., Dict[str, float]] = measure.kernel_us,
) -> List[Row]:
    """A row a kernel for the chosen tiles, for others a row a convolution; and BatchNorm's sum.

    Args:
        run (dict): Of :func:`.rows.describe_run`.
        setting (tuple): Shape, dtype and layout.
        tiles (sequence of Tiles): Other tiles.
        device (torch.device): A CUDA device.
        kernel_us: :func:`.measure.kernel_us`.

    Returns:
        list[dict]: Rows of ``COLUMNS``. ``of_copy`` is the kernel's share of the speed of a copy:
        1 is the best that can be hoped for.
    """
    shape, dtype, layout = setting
    x = _random(setting, device, 0)

    def copy() -> Iterator[str]:
        x.clone()
        yield 'step'

    copy_us = sum(kernel_us(copy, device).values())
    same = dict(run, shape=','.join(map(str, shape)), dtype=dtype, layout=layout)

    def row(kernel: str, us: float, tiles: Sequence[int] = ('',) * len(Tiles._fields)) -> Row:
        passes = PASSES.get(kernel)
        share = f'{passes / 2 * copy_us / us:.3f}' if passes else ''
        known = dict(zip(Tiles._fields, map(str, tiles)))
        return dict(same, **known, kernel=kernel, median_us=f'{us:.4g}', of_copy=share)

    bn_us = sum(kernel_us(_bn_step(setting, device), device).values())
    rows = [row('copy', copy_us), row('bn', bn_us)]
    for choice in (Tiles(), *tiles):
        times = kernel_us(_step(setting, choice, device), device)
        names = PASSES if choice == Tiles() else _CONVOLUTIONS
        rows += [row(name, times[name], choice) for name in names if name in times]
    return rows


def _bn_step(setting: Setting, device: torch.device) -> measure.Step:
    x, dy = (_random(setting, device, seed) for seed in range(2))
    norm = nn.BatchNorm2d(x.shape[1], device=device)
    x.requires_grad_()

    def step() -> Iterator[str]:
        y = norm(x)
        torch.autograd.grad(y, [x, *norm.parameters()], dy)
        yield 'step'

    return step


def table(rows: List[Row]) -> str:
    """The rows of one setting: each kernel, and the best of the other tiles."""
    first = rows[0]
    title = f'{first["shape"]} {first["dtype"]} {first["layout"]}'
    lines = [f'\n{title}\n{"":22}{"us":>9}{"of copy":>9}{"best us":>9}  with']
    chosen = tuple(map(str, Tiles()))
    total = 0.0
    for row in rows:
        if _tiles(row) not in (chosen, ('',) * len(chosen)):
            continue
        line = f'{row["kernel"]:22}{float(row["median_us"]):9.1f}{row["of_copy"]:>9}'
        others = [r for r in rows if r['kernel'] == row['kernel'] and r is not row]
        if others:
            best = min(others, key=lambda r: float(r['median_us']))
            changed = zip(Tiles._fields, _tiles(best), chosen)
            shown = ', '.join(f'{name}={value}' for name, value, usual in changed if value != usual)
            line += f'{float(best["median_us"]):9.1f}  {shown}'
        lines.append(line)
        total += float(row['median_us']) * (_tiles(row) == chosen)
    bn = next(float(row['median_us']) for row in rows if row['kernel'] == 'bn')
    lines.append(f'{"ubn, all kernels":22}{total:9.1f}{"":9}{total / bn:9.2f}  x bn')
    return '\n'.join(lines)


def _tiles(row: Row) -> Tuple[str, ...]:
    return tuple(row[name] for name in Tiles._fields)

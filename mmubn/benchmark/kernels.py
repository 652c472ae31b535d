"""UBN's Triton kernels one by one: how near each comes to a copy, and which tiles would be faster.

Needs torch and Triton alone.
"""

import os
import sys
from concurrent.futures import ProcessPoolExecutor, wait
from itertools import product
from multiprocessing import get_context
from typing import Callable, Dict, Iterator, List, Sequence, Tuple

import torch
from torch import nn

from ..ops.backend import TRITON
from ..ops.triton_backend import Tiles
from . import measure
from .norm import random_inputs
from .rows import Row
from .subjects import layer_step, with_norm

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
    *(Tiles(ahead=ahead) for ahead in (1, 2, 4)),
    Tiles(unroll=3),
]
OTHER_TILES.remove(Tiles())
# The kernels in their order, with their reads and writes of tensors of X's size.
PASSES = dict(
    **dict(moments=1, squared_sums=1, finish_row=0, decide=0, write_output=2),
    **dict(sum_pixels=2, reduce_sums=0, write_input_gradient=3),
)
_CONVOLUTIONS = ('write_output', 'sum_pixels', 'write_input_gradient')

Setting = Tuple[Tuple[int, ...], str, str]  # shape, dtype, layout


def _step(setting: Setting, norm: str, device: torch.device) -> measure.Step:
    layer = with_norm(nn.BatchNorm2d(setting[0][1], device=device), norm)
    return layer_step(layer, *random_inputs(*setting, device))


def compile_all(every: Sequence[Setting], tiles: Sequence[Tiles], device: torch.device) -> None:
    """Fills Triton's cache, a process a core: one alone would compile for many minutes.

    What cannot be compiled is said when it is timed.
    """
    workers = min(os.cpu_count() or 1, 12)
    with ProcessPoolExecutor(workers, mp_context=get_context('spawn')) as pool:
        jobs = [pool.submit(_compile, *job) for job in product(every, tiles, [device])]
        try:
            wait(jobs)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)  # else the rest would be compiled
            raise


def _compile(setting: Setting, tiles: Tiles, device: torch.device) -> None:
    TRITON.tiles = tiles
    for _ in _step(setting, 'ubn_triton', device)():
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
    _, dy = random_inputs(*setting, device)

    def copy() -> Iterator[str]:
        dy.clone()
        yield 'copy'

    copy_us = sum(kernel_us(copy, device).values())
    same = dict(run, shape=','.join(map(str, shape)), dtype=dtype, layout=layout)

    def row(kernel: str, us: float, tiles: Sequence[int] = ('',) * len(Tiles._fields)) -> Row:
        passes = PASSES.get(kernel)
        share = f'{passes / 2 * copy_us / us:.3f}' if passes else ''
        known = dict(zip(Tiles._fields, map(str, tiles)))
        return dict(same, **known, kernel=kernel, median_us=f'{us:.4g}', of_copy=share)

    bn_us = sum(kernel_us(_step(setting, 'bn', device), device).values())
    rows = [row('copy', copy_us), row('bn', bn_us)]
    step = _step(setting, 'ubn_triton', device)
    for choice in (*tiles, Tiles()):  # which are left in place
        TRITON.tiles = choice
        try:
            times = kernel_us(step, device)
        except Exception as error:  # Triton has one for each thing that tiles can ask too much of
            if choice == Tiles():
                raise
            print(f'{choice}: {error}', file=sys.stderr)
            continue
        names = PASSES if choice == Tiles() else _CONVOLUTIONS
        rows += [row(name, times[name], choice) for name in names if name in times]
    return rows


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

"""The kernels' benchmark: other tiles compute the same; rows and table say what was measured."""

import os
import re
import subprocess
import sys

import pytest
import torch
from tool import ROOT, run_tool

from mmubn.benchmark.kernels import COLUMNS, OTHER_TILES, PASSES, table, time_kernels
from mmubn.layers import UBN
from mmubn.ops.backend import TRITON
from mmubn.ops.triton_backend import Tiles

pytest.importorskip('triton', minversion='3.3')


@pytest.mark.usefixtures('on_kernel_device')
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=str)
# Those that share out an image of this size otherwise.
@pytest.mark.parametrize(
    'tiles', [t for t in OTHER_TILES if t.warps == 4 and t.programs == 1024], ids=str
)
def test_a_step_is_the_same_with_other_tiles(tiles, layout, monkeypatch):
    """More channels, columns and rows than a tile."""
    shape = (2, 2, 14, 140) if layout == torch.contiguous_format else (2, 70, 14, 3)
    x, dy = (torch.randn(shape).contiguous(memory_format=layout) for _ in range(2))
    monkeypatch.setattr(TRITON, 'tiles', tiles)
    results = []
    for backend in ('torch', 'triton'):
        layer, value = UBN(shape[1], backend=backend), x.clone().requires_grad_()
        y = layer(value)
        affine = layer.weight, layer.kernel, layer.bias
        results.append((y, *torch.autograd.grad(y, [value, *affine], dy)))
    (y, dx, *gradients), (y_tiles, dx_tiles, *gradients_tiles) = results
    torch.testing.assert_close(y_tiles, y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dx_tiles, dx, rtol=1e-4, atol=1e-4)
    for wanted, got in zip(gradients, gradients_tiles):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-2)


def test_rows_and_table():
    """A copy of 10 us is 2 passes, so 30 us for write_output's 2 is a third of its speed."""
    wide = Tiles(values=512)
    copy, bn = {'copy': 10.0}, {'statistics': 15.0, 'rest': 25.0}
    ubn, ubn_wide = ({'fill': 1.0, **dict.fromkeys(PASSES, us)} for us in (30.0, 20.0))
    measured = iter([copy, bn, ubn_wide, ubn])

    def kernel_us(step, device):
        return next(measured)

    setting = (2, 3, 4, 4), 'float32', 'contiguous'
    run = dict.fromkeys(COLUMNS[:6], 'x')
    rows = time_kernels(run, setting, [wide], torch.device('cpu'), kernel_us)
    assert [row['kernel'] for row in rows[:2]] == ['copy', 'bn']
    assert rows[1]['median_us'] == '40'
    assert len(rows) == 2 + len(PASSES) + 3
    assert all(set(row) == set(COLUMNS) for row in rows)
    assert {row['of_copy'] for row in rows if row['kernel'] == 'write_output'} == {'0.333', '0.500'}
    lines = [line.split() for line in table(rows).splitlines()]
    assert ['write_output', '30.0', '0.333', '20.0', 'values=512'] in lines
    assert ['decide', '30.0'] in lines
    assert lines[-1] == ['ubn,', 'all', 'kernels', '240.0', '6.00', 'x', 'bn']


def test_tiles_that_fail_are_left_out(capsys):
    def kernel_us(step, device):
        if TRITON.tiles.warps == 8:
            raise RuntimeError('out of resource: shared memory')
        return dict.fromkeys(PASSES, 1.0)

    setting = (2, 3, 4, 4), 'float32', 'contiguous'
    tiles = [Tiles(warps=8), Tiles(warps=2)]
    run = dict.fromkeys(COLUMNS[:6], 'x')
    rows = time_kernels(run, setting, tiles, torch.device('cpu'), kernel_us)
    assert {row['warps'] for row in rows[2:]} == {'2', str(Tiles().warps)}
    assert re.search('warps=8.*: out of resource: shared memory', capsys.readouterr().err)
    assert TRITON.tiles == Tiles()


def test_no_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(SystemExit, match='1'):
        run_tool('benchmark_kernels')
    assert capsys.readouterr().err.startswith('error: --device: torch sees no GPU cuda')


@pytest.mark.slow
def test_the_host_alone():
    """Without a GPU, beside BatchNorm, which launches nothing of Triton's."""
    done = subprocess.run(
        [sys.executable, ROOT / 'tools' / 'benchmark_kernels.py', '--host'],
        env={**os.environ, 'TRITON_INTERPRET': '0', 'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    launches = {kind: int(last) for kind, *_, last in rows}
    assert launches == dict(bn=0, ubn=9, rbn=8, bnet=8, iebn=8)
    assert all(float(time) > 0 for _, *times, _ in rows for time in times)

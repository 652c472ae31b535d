"""The check of a GPU says where there is none; its commands are ones that its tools take."""

import sys
import time
from types import SimpleNamespace

import pytest
import torch
from tool import ROOT, names_of

from mmubn.ops.triton_backend import TritonBackend


@pytest.fixture
def tool():
    return SimpleNamespace(**names_of('gpu_check'))


def test_no_gpu(fails, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert fails('gpu_check') == 'gpu_check: torch sees no GPU, so there is nothing to check'


def test_kernels_that_cannot_run(fails, monkeypatch):
    """As on a machine without a C compiler: plain torch is not measured under their name."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch, 'zeros', lambda *shape, device: torch.ones(shape))
    monkeypatch.setattr(TritonBackend, 'why_not', lambda self, x, kernel_size: 'no C compiler')
    assert fails('gpu_check') == 'gpu_check: the kernels cannot run here: no C compiler'


def test_benchmarks_are_ones_that_there_are(tool):
    for name, arguments in tool.BENCHMARKS:
        names_of(name)['parse_args']([*arguments, '--device', 'cpu'])  # exits where it refuses


def test_tests_are_ones_that_there_are(tool):
    assert all((ROOT / file).is_file() for file in tool.TESTS)


@pytest.mark.parametrize('handler', ['default_int_handler', 'SIG_IGN'])
def test_what_takes_too_long_is_interrupted_or_killed(tool, monkeypatch, handler):
    monkeypatch.setitem(tool._finish.__globals__, 'STOPPING', 1)
    # Said by each, as what runs in the background of a shell ignores interrupts.
    code = f'import signal, time; signal.signal(signal.SIGINT, signal.{handler}); time.sleep(60)'
    start = time.monotonic()
    late = [tool._start([sys.executable, '-c', code]) for _ in range(3)]
    assert not tool._finish(start + 1, *late)
    for process in late:
        process.wait(10)
    assert time.monotonic() - start < 20


def test_what_ends_well_is_told_from_what_fails(tool):
    well, badly = ([sys.executable, '-c', f'exit({code})'] for code in (0, 3))
    assert tool._finish(time.monotonic() + 30, tool._start(well))
    assert not tool._finish(time.monotonic() + 30, tool._start(well), tool._start(badly))

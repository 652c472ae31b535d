"""What the Triton kernels compile to with no GPU present, and that it computes a step."""

import json
import os
import subprocess
import sys
from pathlib import Path

import ptx
import pytest
import torch
from tool import version

triton = pytest.importorskip('triton', minversion='3.3')


def lines_of(script, *arguments):
    """What a script beside this file prints."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name(script), *arguments],
        env={**os.environ, 'TRITON_INTERPRET': '0'},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def compile_all(*arguments):
    return [json.loads(line) for line in lines_of('compile_kernels.py', *arguments)]


def run_ptx(*arguments):
    pytest.importorskip('triton', minversion='3.6')  # whose driver the script stands in for
    return lines_of('run_ptx.py', *arguments)


def test_kernels_compile_without_spilling():
    """For an H100's architecture, without one; half precision, k = 3, both layouts."""
    # From Triton 3.9 on, finish_row spills two registers in channels_last.
    spilled = dict(finish_row=8) if version(triton.__version__) >= (3, 9) else {}
    compiled = compile_all('90', 'bfloat16', '3')
    assert len(compiled) == 2 * 8
    for kernel in compiled:
        assert kernel['spilled_bytes'] <= spilled.get(kernel['kernel'], 0), kernel
        assert kernel['registers'] <= 128, kernel


@pytest.mark.slow
@pytest.mark.parametrize('architecture', ['80', '90', 'gfx942'])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float64'])
def test_every_kernel_compiles(architecture, dtype):
    compiled = compile_all(architecture, dtype, '3', '--every-layer')
    for kernel in compiled + compile_all(architecture, dtype, '1', '5', '7'):
        assert dtype == 'float64' or kernel['spilled_bytes'] <= 16, kernel


def test_a_step_by_what_the_kernels_compile_to():
    assert run_ptx('90', 'bfloat16') == ['UBN contiguous', 'UBN channels_last']


@pytest.mark.slow
@pytest.mark.parametrize('architecture', ['80', '90'])
@pytest.mark.parametrize('dtype', ['float16', 'bfloat16', 'float32', 'float64'])
def test_every_layer_by_what_the_kernels_compile_to(architecture, dtype):
    assert len(run_ptx(architecture, dtype, '--every-layer')) == 2 * 11


REVERSES = """
.visible .entry reverses(
    .param .u64 .ptr .global .align 1 reverses_param_0
)
.reqntid 64
{
    .reg .b32 %r<5>;
    .reg .b64 %rd<3>;
    mov.u32 %r1, %tid.x;
    shl.b32 %r2, %r1, 2;
    st.shared.b32 [%r2], %r1;
    bar.sync 0;
    sub.s32 %r3, 252, %r2;
    ld.shared.b32 %r4, [%r3];
    ld.param.b64 %rd1, [reverses_param_0];
    mad.wide.u32 %rd2, %r1, 4, %rd1;
    st.global.b32 [%rd2], %r4;
    ret;
}
"""


def test_the_machine_sees_what_a_gpu_would_not_forgive():
    found = torch.zeros(64, dtype=torch.int32)
    ptx.Program(REVERSES).run((1, 1), [found], shared=256)
    assert found.tolist() == list(range(63, -1, -1))
    ptx.Program(REVERSES.replace('bar.sync 0;', '')).run((1, 1), [found], shared=256)
    assert found.tolist() != list(range(63, -1, -1))
    for text, shared, fault in (
        (REVERSES, 128, r'out of bounds: st\.shared'),
        (REVERSES.replace('mad.wide.u32 %rd2, %r1, 4', 'mad.wide.u32 %rd2, %r1, 8'), 256, 'bounds'),
        (REVERSES.replace('mad.wide.u32 %rd2, %r1, 4', 'mad.wide.u32 %rd2, %r1, 2'), 256, 'align'),
        (REVERSES.replace('mad.wide.u32 %rd2, %r1, 4', 'mad.wide.u32 %rd2, 0, 4'), 256, 'two val'),
        (REVERSES.replace('sub.s32 %r3, 252, %r2', 'sub.s32 %r3, 252, %r4'), 256, 'never written'),
        (REVERSES.replace('sub.s32', 'subc.s32'), 256, 'unknown: subc'),
    ):
        with pytest.raises(ptx.Fault, match=fault):
            ptx.Program(text).run((1, 1), [found], shared)

"""Compiles the Triton kernels with no GPU present: compile_kernels.py ARCHITECTURE DTYPE K...

ARCHITECTURE is NVIDIA's (80, 90) or AMD's (gfx942). Prints a line of JSON for each kernel, k,
memory format and layer: the registers of a thread, and how many bytes of them it spills.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mmubn.benchmark.kernels import PASSES
from mmubn.ops import Buffers, Parameters, Settings, triton_kernels
from mmubn.ops.triton_backend import TritonBackend

CUOBJDUMP = Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin' / 'cuobjdump'
TYPES = {
    torch.float16: 'fp16',
    torch.bfloat16: 'bf16',
    torch.float32: 'fp32',
    torch.float64: 'fp64',
    torch.int64: 'i64',
    torch.bool: 'i1',
}
SHAPE = (32, 64, 56, 56)


class Compiled:
    """Stands in for a kernel: a launch compiles it for its arguments and prints what came out."""

    def __init__(self, kernel, target, label):
        self.kernel, self.target, self.label = kernel, target, label

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *arguments, **options):
        signature, constants, attributes = {}, {}, {}
        for index, (parameter, value) in enumerate(zip(self.kernel.params, arguments)):
            is_tensor = isinstance(value, torch.Tensor)
            is_special = not is_tensor and not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (is_special and value == 1):
                signature[parameter.name] = 'constexpr'
                constants[(index,)] = value
            elif isinstance(value, float):
                signature[parameter.name] = parameter.annotation_type or 'fp32'
            else:
                signature[parameter.name] = '*' + TYPES[value.dtype] if is_tensor else 'i32'
                if is_tensor or (is_special and value % 16 == 0):
                    attributes[(index,)] = [['tt.divisibility', 16]]
        assert len(arguments) == len(self.kernel.params), self.kernel.__name__
        source = ASTSource(self.kernel, signature, constants, attributes)
        binary = triton.compile(source, target=self.target, options=options)
        usage = nvidia_usage if self.target.backend == 'cuda' else amd_usage
        print(json.dumps(dict(kernel=self.kernel.__name__, **self.label, **usage(binary))))


def nvidia_usage(binary):
    """Registers and bytes of stack, which only spilled registers use."""
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(binary.asm['cubin'])
        file.flush()
        command = [CUOBJDUMP, '-res-usage', file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r'REG:(\d+) STACK:(\d+)', usage).groups()
    return dict(registers=int(registers), spilled_bytes=int(stack))


def amd_usage(binary):
    """The same of a lane."""
    assembly = binary.asm['amdgcn']
    registers = re.search(r'\.vgpr_count: +(\d+)', assembly).group(1)
    spilled = re.search(r'\.vgpr_spill_count: +(\d+)', assembly).group(1)
    return dict(registers=int(registers), spilled_bytes=4 * int(spilled))


def layers(channels, kernel_size, dtype):
    """Parameters and settings that between them take every branch that is decided in compiling."""
    weight, kernel = torch.empty(channels), torch.empty(channels, 1, kernel_size, kernel_size)
    affine = Parameters(weight, kernel if kernel_size > 1 else None, weight)
    affine = Parameters(*[None if value is None else value.to(dtype) for value in affine])
    calibration = ('center_weight', 'scale_weight', 'scale_bias')
    ubn = affine._replace(**dict.fromkeys(calibration, affine.weight))
    yield 'UBN', ubn, Settings(fct=0.15), 1
    yield 'SyncUBN', ubn, Settings(fct=0.15, stride=2, momentum=None), 2
    yield 'evaluation', ubn, Settings(training=False), 1
    yield 'recomputed', ubn, Settings(fct=0.15, update=False), 1
    iebn = ubn._replace(center_weight=None)
    yield 'IEBN', iebn, Settings(scale_from_input=True), 1
    yield 'BNET', affine, Settings(), 1
    yield 'plain', Parameters(), Settings(update=False), 1


def step(backend, x, parameters, settings, ranks):
    """All of a step."""
    channels, wide = x.shape[1], torch.promote_types(x.dtype, torch.float32)
    running = torch.empty(channels, dtype=wide)
    count, flag = torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.bool)
    buffers = Buffers(running, running, count, running[0], flag)
    stride = settings.stride if settings.fct is not None and settings.update else 0
    image_mean, row = backend.measure(x, parameters.center_weight, stride)
    rows = row.expand(ranks, -1) if settings.training else None
    *_, statistics = backend.normalize(x, image_mean, rows, parameters, buffers, settings)
    known = statistics, parameters, settings
    sums = backend.backward_sums(x, x, image_mean, *known)
    backend.backward_input(x, statistics, sums.d_statistics, parameters, settings, sums)


def main(architecture, dtype, *kernel_sizes, every_layer=False):
    target = GPUTarget('hip', architecture, 64 if architecture.startswith('gfx9') else 32)
    if architecture.isdecimal():
        target = GPUTarget('cuda', int(architecture), 32)
    kernels = {name: getattr(triton_kernels, name) for name in PASSES}
    x = torch.empty(SHAPE, dtype=getattr(torch, dtype))
    wide = torch.promote_types(x.dtype, torch.float32)
    for size in map(int, kernel_sizes):
        for name, parameters, settings, ranks in layers(x.shape[1], size, wide):
            if name != 'UBN' and not every_layer:
                continue
            for memory_format in (torch.contiguous_format, torch.channels_last):
                label = dict(layer=name, kernel_size=size, memory_format=str(memory_format))
                for kernel_name, kernel in kernels.items():
                    setattr(triton_kernels, kernel_name, Compiled(kernel, target, label))
                formatted = x.contiguous(memory_format=memory_format)
                step(TritonBackend(), formatted, parameters, settings, ranks)


if __name__ == '__main__':
    options = [argument for argument in sys.argv[1:] if argument != '--every-layer']
    main(*options, every_layer='--every-layer' in sys.argv)

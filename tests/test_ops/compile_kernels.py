"""Compiles the Triton kernels with no GPU present: compile_kernels.py ARCHITECTURE DTYPE K...

Prints a line of JSON for each kernel, k and memory format: registers and bytes of stack
(spilled registers) of a thread.
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

from mmubn.ops import passes_triton

KERNELS = ('_moments', '_squared_sum', '_forward', '_backward_sums', '_backward_input')
CUOBJDUMP = Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin' / 'cuobjdump'
TYPES = {
    torch.float16: 'fp16',
    torch.bfloat16: 'bf16',
    torch.float32: 'fp32',
    torch.float64: 'fp64',
}


class Compiled:
    """Stands in for a kernel: a launch compiles it for its arguments and prints what came out."""

    def __init__(self, kernel, architecture, label):
        self.kernel, self.architecture, self.label = kernel, architecture, label

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *arguments):
        signature, constants, attributes = {}, {}, {}
        for index, (parameter, value) in enumerate(zip(self.kernel.params, arguments)):
            aligned = isinstance(value, torch.Tensor) or value % 16 == 0
            if parameter.is_constexpr or (not isinstance(value, torch.Tensor) and value == 1):
                signature[parameter.name] = 'constexpr'
                constants[(index,)] = value
                continue
            is_tensor = isinstance(value, torch.Tensor)
            signature[parameter.name] = '*' + TYPES[value.dtype] if is_tensor else 'i32'
            if aligned:
                attributes[(index,)] = [['tt.divisibility', 16]]
        source = ASTSource(self.kernel, signature, constants, attributes)
        binary = triton.compile(source, target=GPUTarget('cuda', self.architecture, 32))
        with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
            file.write(binary.asm['cubin'])
            file.flush()
            command = [CUOBJDUMP, '-res-usage', file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, stack = re.search(r'REG:(\d+) STACK:(\d+)', usage).groups()
        found = dict(kernel=self.kernel.__name__, **self.label)
        print(json.dumps(dict(found, registers=int(registers), stack_bytes=int(stack))))


def main(architecture, dtype, *kernel_sizes):
    kernels = {name: getattr(passes_triton, name) for name in KERNELS}
    x = torch.empty(32, 64, 56, 56, dtype=getattr(torch, dtype))
    wide = torch.promote_types(x.dtype, torch.float32)
    small = torch.empty(32, 64, dtype=wide)
    for size in map(int, kernel_sizes):
        taps = torch.empty(64, size, size, dtype=wide)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            label = dict(kernel_size=size, memory_format=str(memory_format))
            for name, kernel in kernels.items():
                setattr(passes_triton, name, Compiled(kernel, int(architecture), label))
            formatted = x.contiguous(memory_format=memory_format)
            passes_triton.image_moments(formatted)
            passes_triton.squared_sum(formatted, small[:, 0])
            passes_triton.forward(formatted, small, small, taps, small[0])
            passes_triton.backward_sums(formatted, formatted, small, small, taps)
            passes_triton.backward_input(
                formatted, formatted, small, small, small, small, taps, None
            )


if __name__ == '__main__':
    main(*sys.argv[1:])

"""Runs PTX, what Triton compiles a kernel to, with numpy and without a GPU.

All programs of a launch run at the same time. In each program one warp after the other, in an order
by chance, runs up to the next barrier, so that a missing barrier shows. The threads of a warp run
in lockstep; where they part, those that are behind go first, and wait for the others where all of a
warp are needed.

What a GPU would not forgive is a :class:`Fault`: an access out of bounds or out of alignment, a
barrier that only some threads reach, a register that was never written, two values for one place of
a tensor. Of two values for one place in shared memory a GPU keeps any, and so does this machine.

It knows the instructions that the kernels of this project have, and stops at any other. Division,
and the functions that NVIDIA calls approximate, are a little more exact than on a GPU.

Source: NVIDIA, PTX ISA 8.7.
"""

import ctypes
import re
from bisect import bisect
from typing import Any, Dict, Iterator, List, NamedTuple, Sequence, Tuple

import numpy as np
import torch

WARP = 32
# Threads at once, of whole programs: more would leave the caches.
AT_ONCE = 1 << 16

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
TYPES = {
    **{f'b{8 * size}': kind for size, kind in UNSIGNED.items()},
    **{f'u{8 * size}': kind for size, kind in UNSIGNED.items()},
    **dict(s8=np.int8, s16=np.int16, s32=np.int32, s64=np.int64),
    **dict(f16=np.float16, f32=np.float32, f64=np.float64, pred=np.bool_),
}
REGISTERS = {'p': 'pred', 'rs': 'b16', 'r': 'b32', 'rd': 'b64'}
# Instructions by which the threads of a warp meet.
WHOLE_WARPS = ('shfl', 'redux', 'ldmatrix', 'stmatrix')
CHANCE = np.random.default_rng(0)
SMALLEST_NORMAL = np.finfo(np.float32).tiny


class Fault(Exception):
    """What a GPU would not forgive, or what this machine does not know."""


class Instruction(NamedTuple):
    """``@predicate name.modifiers operands``."""

    text: str
    predicate: str  # a register, or nothing
    negated: bool
    name: str
    modifiers: List[str]
    operands: List[str]

    @property
    def type(self) -> str:
        return self.modifiers[-1]


class Memory:
    """The numbers of some tensors, by their addresses."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        self.starts = np.array(sorted(storages), np.int64)
        self.sizes = np.array([storages[start] for start in self.starts], np.int64)
        # To whole words, so that it can be seen as any type.
        whole = [ctypes.c_uint8 * (-(-int(size) // 8) * 8) for size in self.sizes]
        places = zip(whole, map(int, self.starts))
        self.bytes = [np.frombuffer(kind.from_address(start), np.uint8) for kind, start in places]

    def find(self, addresses: np.ndarray, size: int, text: str) -> Iterator[Tuple]:
        """Bytes of a tensor, which addresses are in it, and where; for each that is asked for."""
        if (addresses % size).any():
            raise Fault(f'alignment: {text}')
        which = np.searchsorted(self.starts, addresses, 'right') - 1
        places = addresses - self.starts[which]
        if len(which) and (which.min() < 0 or (places + size > self.sizes[which]).any()):
            raise Fault(f'out of bounds: {text}')
        for index in np.unique(which):
            chosen = which == index
            yield self.bytes[index], chosen, places[chosen]


class Program:
    """A kernel.

    Args:
        text (str): PTX.
    """

    def __init__(self, text: str) -> None:
        text = re.sub(r'//.*', '', text[text.index('.visible .entry') :])
        head, body = text.split('{', 1)
        self.parameters = re.findall(r'\.param \.\w(\d+)[^,)]*\s(\w+)', head)
        self.threads = int(re.search(r'\.reqntid (\d+)', head).group(1))
        self.types: Dict[str, str] = {}  # of registers with names of their own
        self.instructions: List[Instruction] = []
        self.labels: Dict[str, int] = {}
        for line in body[: body.index('\n}')].splitlines():
            label = re.fullmatch(r'\s*(\$\w+):\s*', line)
            if label:
                self.labels[label.group(1)] = len(self.instructions)
            else:
                for part in line.split(';'):
                    self._add(re.sub(r'^\s*{ ', '', part).strip())
        # Where threads may come from elsewhere than from the line before.
        leaves = ('bra', 'ret', 'bar')
        after = {at + 1 for at, i in enumerate(self.instructions) if i.name in leaves}
        meetings = {at for at, i in enumerate(self.instructions) if i.name in WHOLE_WARPS}
        self.starts = sorted({*self.labels.values(), *after, *meetings, len(self.instructions)})

    def _add(self, text: str) -> None:
        if text.startswith('.reg') and '<' not in text:
            _, kind, name = text.split()
            self.types[name] = kind[1:]
        elif text.strip('{}') and not text.startswith('.'):
            predicate, name, operands = re.fullmatch(r'(?:@(\S+)\s+)?(\S+)\s*(.*)', text).groups()
            name, *modifiers = name.split('.')
            negated = (predicate or '').startswith('!')
            # At commas, but not those in braces.
            operands = re.findall(r'{[^}]*}|\[[^]]*\]|[^,\s]+', operands)
            predicate = (predicate or '').lstrip('!')
            self.instructions.append(
                Instruction(text, predicate, negated, name, modifiers, operands)
            )

    def run(self, grid: Tuple[int, int], arguments: Sequence[Any], shared: int) -> None:
        """Runs a launch.

        Args:
            grid (tuple[int, int]): Programs along x and y.
            arguments (Sequence): Tensors and numbers; those that Triton adds are left out.
            shared (int): Bytes of shared memory for each program.

        Raises:
            Fault: See the module.
        """
        tensors = [value for value in arguments if isinstance(value, torch.Tensor)]
        memory, values = Memory(tensors), {}
        for index, (bits, name) in enumerate(self.parameters):
            value = arguments[index] if index < len(arguments) else 0
            if isinstance(value, torch.Tensor):
                value = value.data_ptr()
            kind = ('f' if isinstance(value, float) else 's') + bits
            values[name] = np.array(value, TYPES[kind]).view(TYPES[f'u{bits}'])
        programs = CHANCE.permutation(grid[0] * grid[1])  # no order is promised
        for first in range(0, len(programs), AT_ONCE // self.threads):
            some = programs[first : first + AT_ONCE // self.threads]
            block = _Shared(len(some), shared)
            warps = [
                _Warp(self, some, grid, first_thread, values, block, memory)
                for first_thread in range(0, self.threads, WARP)
            ]
            stops = [warp.run() for warp in warps]
            while True:
                for index in CHANCE.permutation(len(warps)):
                    next(stops[index], None)
                # By program, where each of its threads has stopped.
                at = np.concatenate([warp.at.reshape(-1, WARP) for warp in warps], 1)
                if (at != at[:, :1]).any():
                    raise Fault('only some threads of a program reach a barrier')
                if (at == len(self.instructions)).all():
                    break


class _Shared:
    """The shared memory of some programs."""

    def __init__(self, programs: int, size: int) -> None:
        self.size = -(-size // 16) * 16
        self.bytes = np.full(programs * self.size, 0xCD, np.uint8)


class _Warp:
    """A warp of each of some programs: a value of each thread in every register."""

    def __init__(
        self,
        program: Program,
        programs: np.ndarray,
        grid: Tuple[int, int],
        first_thread: int,
        values: Dict[str, np.ndarray],
        shared: _Shared,
        memory: Memory,
    ) -> None:
        self.program, self.values, self.memory, self.shared = program, values, memory, shared
        self.count = len(programs) * WARP
        number = np.repeat(programs, WARP)
        special = {
            '%tid.x': np.tile(first_thread + np.arange(WARP), len(programs)),
            '%ctaid.x': number % grid[0],
            '%ctaid.y': number // grid[0],
            '%nctaid.x': np.full(self.count, grid[0]),
            '%nctaid.y': np.full(self.count, grid[1]),
            'global_smem': np.zeros(self.count),
        }
        self.registers = {name: value.astype(np.uint32) for name, value in special.items()}
        self.shared_start = np.repeat(np.arange(len(programs)) * shared.size, WARP)
        self.at = np.zeros(self.count, np.int64)
        self.active = np.ones(self.count, bool)

    def run(self) -> Iterator[None]:
        """Stops where all threads wait at a barrier or have returned."""
        program = self.program
        last = len(program.instructions)
        while (self.at < last).any():
            waits = self.at == last
            while not waits.all():
                start, here = self._next(waits)
                stop = program.starts[bisect(program.starts, start)]
                following: Any = stop
                for index, instruction in enumerate(program.instructions[start:stop], start):
                    self.active = here
                    if instruction.predicate:
                        chosen = self.registers[instruction.predicate] != instruction.negated
                        self.active = here & chosen
                    if instruction.name == 'bra':
                        target = program.labels[instruction.operands[0]]
                        following = np.where(self.active, target, index + 1)
                    elif instruction.name == 'ret':
                        following = np.where(self.active, last, index + 1)
                    elif instruction.name == 'bar':
                        waits = waits | here
                    else:
                        self._do(instruction)
                self.at = np.where(here, following, self.at)
                waits = waits | (self.at == last)
            yield

    def _next(self, waits: np.ndarray) -> Tuple[int, np.ndarray]:
        """Where it goes on, and which threads."""
        for start in np.unique(self.at[~waits]):
            here = (self.at == start) & ~waits
            if self.program.instructions[start].name in WHOLE_WARPS:
                here &= np.repeat(here.reshape(-1, WARP).all(1), WARP)
            if here.any():
                return int(start), here
        raise Fault(f'only some threads of a warp: {self.program.instructions[start].text}')

    def _do(self, instruction: Instruction) -> None:
        name, kind, operands = instruction.name, instruction.type, instruction.operands
        own = getattr(self, f'_{name}', None)
        if own:
            own(instruction)
        elif name in SIMPLE and {'wide', 'hi'} & {*instruction.modifiers}:
            wide, bits = f'{kind[0]}{2 * int(kind[1:])}', int(kind[1:])
            factors = [self.read(operand, kind).astype(TYPES[wide]) for operand in operands[1:3]]
            added = [self.read(operand, wide) for operand in operands[3:]]
            value = SIMPLE[name](*factors, *added)
            if 'hi' in instruction.modifiers:
                value = (value >> TYPES[wide](bits)).astype(TYPES[kind])
            self.write(operands[0], value)
        elif name in SIMPLE:
            sources = [self.read(operand, kind) for operand in operands[1:]]
            if 'ftz' in instruction.modifiers:
                sources = [np.where(np.abs(s) < SMALLEST_NORMAL, s * 0, s) for s in sources]
            value = np.asarray(SIMPLE[name](*sources))
            if 'relu' in instruction.modifiers:
                value = np.maximum(value, 0)
            self.write(operands[0], value.astype(TYPES[kind]))
        else:
            raise Fault(f'unknown: {instruction.text}')

    # --- Registers.

    def read(self, operand: str, kind: str) -> np.ndarray:
        """A register or a constant as a type: its lowest bits, or with zeros before them."""
        wanted = np.dtype(TYPES[kind])
        if operand in self.registers:
            value = self.registers[operand]
            if 'b' in (value.dtype.kind, wanted.kind):
                return value
            if value.dtype.itemsize != wanted.itemsize:
                value = value.astype(UNSIGNED[wanted.itemsize])
            return value.view(wanted)
        if operand.startswith(('0f', '0d')):
            bits = int(operand[2:], 16)
        elif operand[0].isdigit() or operand[0] == '-':
            bits = int(operand, 0)
        else:
            raise Fault(f'never written: {operand}')
        if wanted.kind == 'b':
            return np.full(self.count, bool(bits))
        bits &= (1 << 8 * wanted.itemsize) - 1
        return np.full(self.count, bits, UNSIGNED[wanted.itemsize]).view(wanted)

    def write(self, register: str, value: np.ndarray) -> None:
        """In the active threads; a narrow value keeps its sign."""
        if register == '_':
            return
        kind = self.program.types.get(register) or REGISTERS[re.match('%([a-z]+)', register)[1]]
        wanted = np.dtype(TYPES[kind])
        if wanted.kind != 'b':
            if value.dtype.itemsize != wanted.itemsize:
                signed = value.dtype.kind == 'i'
                value = value if signed else value.view(UNSIGNED[value.dtype.itemsize])
                value = value.astype(f'{"i" if signed else "u"}{wanted.itemsize}')
            value = value.view(wanted)
        if not self.active.all():
            before = self.registers.get(register)
            if before is None:
                before = np.full(self.count, ~wanted.type(0))
            value = np.where(self.active, value, before)
        self.registers[register] = value

    def _mov(self, instruction: Instruction) -> None:
        (to, source), kind = instruction.operands, instruction.type
        if to.startswith('{'):
            value, names = self.read(source, kind), _names(to)
            bits = 8 * value.itemsize // len(names)
            for index, name in enumerate(names):
                part = value >> value.dtype.type(index * bits)
                self.write(name, part.astype(UNSIGNED[bits // 8]))
        elif source.startswith('{'):
            names, wide = _names(source), TYPES[kind]
            bits = int(kind[1:]) // len(names)
            parts = [self.read(name, f'u{bits}').astype(wide) for name in names]
            self.write(to, sum(part << wide(index * bits) for index, part in enumerate(parts)))
        else:
            self.write(to, self.read(source, kind))

    def _selp(self, instruction: Instruction) -> None:
        to, first, second, chosen = instruction.operands
        values = [self.read(operand, instruction.type) for operand in (first, second)]
        self.write(to, np.where(self.registers[chosen], *values))

    def _setp(self, instruction: Instruction) -> None:
        to, *sources = instruction.operands
        comparison, kind = instruction.modifiers[0], instruction.type
        first, second = (self.read(source, kind) for source in sources[:2])
        unordered = np.isnan(first) | np.isnan(second) if kind[0] == 'f' else np.False_
        if comparison == 'nan':
            found = unordered
        elif kind[0] == 'f' and comparison.endswith('u'):
            found = COMPARISONS[comparison[:-1]](first, second) | unordered
        else:
            found = COMPARISONS[comparison](first, second) & ~unordered
        if len(sources) > 2:
            other = self.registers[sources[2].lstrip('!')] != sources[2].startswith('!')
            found = SIMPLE[instruction.modifiers[1]](found, other)
        self.write(to, found)

    def _cvt(self, instruction: Instruction) -> None:
        (to, *sources), (*how, target, source) = instruction.operands, instruction.modifiers
        values = [_widened(self.read(operand, _bits(source)), source) for operand in sources]
        if target.endswith('x2'):
            high, low = (_narrowed(value, target[:-2]).astype(np.uint32) for value in values)
            self.write(to, high << np.uint32(16) | low)
        elif target in ('f16', 'bf16'):
            self.write(to, _narrowed(values[0], target))
        else:
            value = values[0]
            if source[0] == 'f' and target[0] != 'f':
                value = np.trunc(value) if 'rzi' in how else np.rint(value)
            self.write(to, value.astype(TYPES[target]))

    def _shl(self, instruction: Instruction) -> None:
        to, value, by = instruction.operands
        value, by = self.read(value, instruction.type), self.read(by, 'u32')
        inside = by < 8 * value.itemsize
        self.write(to, np.where(inside, value << (by * inside).astype(value.dtype), 0 * value))

    def _shr(self, instruction: Instruction) -> None:
        to, value, by = instruction.operands
        value = self.read(value, instruction.type)
        by, most = self.read(by, 'u32'), 8 * value.itemsize - 1
        moved = value >> np.minimum(by, most).astype(value.dtype)
        self.write(to, moved if value.dtype.kind == 'i' else np.where(by <= most, moved, 0 * value))

    def _bfe(self, instruction: Instruction) -> None:
        to, value, first, length = instruction.operands
        value = self.read(value, instruction.type)
        above = 8 * value.itemsize - int(first) - int(length)
        by = value.dtype.type
        self.write(to, value << by(above) >> by(above + int(first)))

    # --- Between threads.

    def _shfl(self, instruction: Instruction) -> None:
        to, value, by, *_ = instruction.operands
        value, by = (self.read(operand, 'u32').reshape(-1, WARP) for operand in (value, by))
        lane = np.arange(WARP, dtype=np.uint32)
        source = dict(bfly=lane ^ by, idx=by % WARP)[instruction.modifiers[1]]
        self.write(to, np.take_along_axis(value, source.astype(np.int64), 1).ravel())

    def _redux(self, instruction: Instruction) -> None:
        to, value, _ = instruction.operands
        reduce = dict(min=np.min, max=np.max)[instruction.modifiers[1]]
        found = reduce(self.read(value, instruction.type).reshape(-1, WARP), axis=1)
        self.write(to, np.repeat(found, WARP))

    def _matrix_places(self, instruction: Instruction, address: str, matrix: int) -> np.ndarray:
        """Of the two numbers that each thread has in a matrix of 8 x 8, one after the other."""
        rows = self._address(address).reshape(-1, WARP)[:, 8 * matrix : 8 * matrix + 8]
        rows = np.where(self.active[::WARP, None], rows, 0)
        self._check_shared(rows, 16, instruction)
        lane = np.arange(WARP)
        row, column = lane[:, None] // 4, lane[:, None] % 4 * 2 + np.arange(2)
        if 'trans' in instruction.modifiers:
            row, column = column, row
        place = self.shared_start.reshape(-1, WARP)[:, :, None] + rows[:, row]
        return (place // 2 + column).reshape(-1, 2)

    def _ldmatrix(self, instruction: Instruction) -> None:
        to, address = instruction.operands
        numbers = self.shared.bytes.view(np.uint16)
        for matrix, register in enumerate(_names(to)):
            pair = numbers[self._matrix_places(instruction, address, matrix)]
            self.write(register, pair.view(np.uint32).ravel())

    def _stmatrix(self, instruction: Instruction) -> None:
        address, sources = instruction.operands
        numbers = self.shared.bytes.view(np.uint16)
        for matrix, register in enumerate(_names(sources)):
            places = self._matrix_places(instruction, address, matrix)
            pairs = self.read(register, 'u32').view(np.uint16).reshape(-1, 2)
            numbers[places[self.active]] = pairs[self.active]

    # --- Memory.

    def _address(self, operand: str) -> np.ndarray:
        register, offset = re.fullmatch(r'\[\s*(\S+?)\s*(?:\+\s*(-?\d+)\s*)?\]', operand).groups()
        return self.read(register, 'u64').astype(np.int64) + int(offset or 0)

    def _check_shared(self, places: np.ndarray, size: int, instruction: Instruction) -> None:
        if (places % size).any():
            raise Fault(f'alignment: {instruction.text}')
        if len(places) and (places.min() < 0 or places.max() + size > self.shared.size):
            raise Fault(f'out of bounds: {instruction.text}')

    def _find(self, instruction: Instruction, address: str, size: int) -> Iterator[Tuple]:
        """As :meth:`Memory.find`, for the active threads."""
        addresses = self._address(address)[self.active]
        if instruction.modifiers[0] == 'global':
            yield from self.memory.find(addresses, size, instruction.text)
        else:
            self._check_shared(addresses, size, instruction)
            places = addresses + self.shared_start[self.active]
            yield self.shared.bytes, np.ones(len(addresses), bool), places

    def _ld(self, instruction: Instruction) -> None:
        to, address = instruction.operands
        if instruction.modifiers[0] == 'param':
            value = self.values[address.strip('[]')]
            self.write(to, np.full(self.count, value))
            return
        names, kind = _names(to), TYPES[_bits(instruction.type)]
        size = np.dtype(kind).itemsize
        found = np.zeros((len(names), int(self.active.sum())), kind)
        for memory, chosen, places in self._find(instruction, address, size * len(names)):
            for index in range(len(names)):
                found[index, chosen] = memory.view(kind)[places // size + index]
        for name, part in zip(names, found):
            value = np.zeros(self.count, kind)
            value[self.active] = part
            self.write(name, value)

    def _st(self, instruction: Instruction) -> None:
        address, sources = instruction.operands
        names, kind = _names(sources), _bits(instruction.type)
        values = [self.read(name, kind)[self.active] for name in names]
        size = values[0].itemsize
        for memory, chosen, places in self._find(instruction, address, size * len(names)):
            numbers = memory.view(TYPES[kind])
            order = CHANCE.permutation(len(places))
            for index, value in enumerate(values):
                at, value = places // size + index, value[chosen]
                numbers[at[order]] = value[order]
                if memory is not self.shared.bytes and (numbers[at] != value).any():
                    raise Fault(f'two values for one place: {instruction.text}')


def _fma(first: np.ndarray, second: np.ndarray, third: np.ndarray) -> np.ndarray:
    """Rounded once; of integers, a mad."""
    if first.dtype.kind != 'f':
        return first * second + third
    wide = np.float64 if first.dtype == np.float32 else np.longdouble
    exact = first.astype(wide) * second.astype(wide) + third.astype(wide)
    return exact.astype(first.dtype)


def _divide(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    if first.dtype.kind == 'f':
        return first / second
    second = np.where(second == 0, 1, second).astype(second.dtype)  # in threads without a result
    return (first - np.fmod(first, second)) // second


# Operands and result of one type.
SIMPLE = {
    'add': np.add,
    'sub': np.subtract,
    'mul': np.multiply,
    'mad': _fma,
    'fma': _fma,
    'div': _divide,
    'rem': lambda first, second: first - _divide(first, second) * second,
    'min': np.fmin,
    'max': np.fmax,
    'neg': np.negative,
    'abs': np.abs,
    'and': np.bitwise_and,
    'or': np.bitwise_or,
    'xor': np.bitwise_xor,
    'not': np.invert,
    'sqrt': np.sqrt,
    'rsqrt': lambda value: 1 / np.sqrt(value),
    'rcp': np.reciprocal,
    'ex2': np.exp2,
}
COMPARISONS = {
    'eq': np.equal,
    'ne': np.not_equal,
    'lt': np.less,
    'le': np.less_equal,
    'gt': np.greater,
    'ge': np.greater_equal,
}


def _names(operand: str) -> List[str]:
    """Registers in braces, or one without."""
    return re.findall(r'[^{},\s]+', operand)


def _bits(kind: str) -> str:
    """How a type lies in a register."""
    return dict(f16='u16', bf16='u16').get(kind, kind)


def _widened(value: np.ndarray, kind: str) -> np.ndarray:
    if kind == 'bf16':
        return (value.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return value.view(np.float16) if kind == 'f16' else value


def _narrowed(value: np.ndarray, kind: str) -> np.ndarray:
    """Rounded to the nearest, and of two the even one."""
    if kind == 'f16':
        return value.astype(np.float16).view(np.uint16)
    tensor = torch.from_numpy(np.ascontiguousarray(value)).bfloat16()
    return tensor.view(torch.int16).numpy().view(np.uint16)

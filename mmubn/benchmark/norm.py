"""Norm layers beside BatchNorm and the literal composition: settings, and their rows."""

import argparse
import sys
import time
import traceback
from functools import partial
from itertools import product
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Tuple

import torch
from torch import nn

from ..cli.errors import CommandError
from ..ops import mean_cosine_similarity, reference
from . import measure
from .report import RESNET50_LAYERS, table
from .rows import COLUMNS, Row, append_csv, describe_run, make_rows
from .subjects import KINDS, layer_step, make_model, model_step, with_norm

Shape = Tuple[int, ...]

BASE_SHAPES = [(32, 64, 56, 56), (32, 256, 14, 14), (128, 64, 32, 32), (2, 256, 100, 152)]
# Small planes, and a layer in which only overhead is left.
BASE_SHAPES += [(64, 512, 4, 4), (4, 16, 4, 4)]
RESNET50_SHAPES = [(256, channels, side, side) for channels, side in RESNET50_LAYERS]
# Norms, dtypes and layouts by default. On CUDA ubn is ubn_triton, on the CPU ubn_cpp.
_OTHERS = [kind for kind in KINDS if kind != 'ubn']
NORMS_CPU = ['bn', 'ubn', 'ubn_no_gate', 'ubn_torch', 'literal', *_OTHERS]
NORMS_CUDA = ['bn', 'ubn', 'ubn_no_gate', 'ubn_torch', 'ubn_compiled', 'literal', *_OTHERS]
NORMS_MODEL = ['bn', 'ubn', 'ubn_no_gate', 'literal']
MODEL_SHAPES = {
    ('resnet50', 'cuda'): (256, 3, 224, 224),
    ('resnet50', 'cpu'): (8, 3, 224, 224),
    ('resnet18_small', 'cuda'): (128, 3, 32, 32),
    ('resnet18_small', 'cpu'): (128, 3, 32, 32),
    ('mask_rcnn_r50', 'cuda'): (2, 3, 800, 1344),
    ('mask_rcnn_r50', 'cpu'): (1, 3, 320, 480),
}
LAYOUTS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}
SIMILARITY_BATCHES = [8, 16, 32, 64, 128, 256, 512, 1024]
SIMILARITY_NUMBERS = 1 << 23  # N * D
WARMUP, WARMUP_MODEL = 3, 1  # rounds, after a first run


def parse_shape(text: str) -> Shape:
    """Reads ``N,C,H,W``, for argparse."""
    try:
        shape = tuple(int(number) for number in text.split(','))
    except ValueError:
        shape = ()
    if len(shape) != 4 or min(shape) < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is not N,C,H,W')
    return shape


def fill_in(args: argparse.Namespace) -> None:
    """Gives the options that were not named the defaults of the device and the subject."""
    kind = args.device.type
    if args.model:
        args.norms = args.norms or NORMS_MODEL
        args.shapes = args.shapes or [MODEL_SHAPES[args.model, kind]]
        args.dtypes = args.dtypes or ['bfloat16' if kind == 'cuda' else 'float32']
        args.layouts = args.layouts or ['channels_last' if kind == 'cuda' else 'contiguous']
    else:
        args.norms = args.norms or (NORMS_CUDA if kind == 'cuda' else NORMS_CPU)
        args.shapes = args.shapes or BASE_SHAPES + (RESNET50_SHAPES if kind == 'cuda' else [])
        args.dtypes = args.dtypes or ['float32', 'bfloat16'][: 2 if kind == 'cuda' else 1]
        args.layouts = args.layouts or list(LAYOUTS)[: 2 if kind == 'cuda' else 1]


def random_inputs(
    shape: Shape, dtype: str, layout: str, device: torch.device
) -> Tuple[torch.Tensor, torch.Tensor]:
    """X, which requires a gradient, and dY; the same for every run."""
    generator = torch.Generator().manual_seed(0)

    def random() -> torch.Tensor:
        # Off zero mean, as the input of most layers is.
        value = torch.randn(shape, generator=generator) + 0.5
        value = value.to(device, getattr(torch, dtype))
        return value.contiguous(memory_format=LAYOUTS[layout])

    return random().requires_grad_(), random()


class Bench:
    """One run: measures settings and gives their rows.

    Args:
        args (argparse.Namespace): The options of tools/benchmark_norm.py.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.run = describe_run(args.device)
        self.progress = Progress()

    def settings(self) -> List[Tuple[Callable[..., List[Row]], tuple]]:
        """What to measure: methods with their arguments, each of which gives rows."""
        args = self.args
        if args.similarity:
            return [
                (self.similarity, (batch, dtype))
                for dtype, batch in product(args.dtypes, SIMILARITY_BATCHES)
            ]
        method = self.model if args.model else self.layer
        return [(method, choice) for choice in product(args.shapes, args.dtypes, args.layouts)]

    def layer(self, shape: Shape, dtype: str, layout: str) -> List[Row]:
        """Forward and backward of the norm layers at one shape."""
        device = self.args.device
        x, dy = random_inputs(shape, dtype, layout, device)
        norms = {
            name: with_norm(nn.BatchNorm2d(shape[1], device=device), name)
            for name in self.args.norms
        }
        steps = {name: layer_step(norm, x, dy) for name, norm in norms.items()}
        forwards = {name: partial(norm, x) for name, norm in norms.items()}
        clock = measure.CudaClock(device) if device.type == 'cuda' else measure.CpuClock()
        return self._race(_setting('', shape, dtype, layout), norms, steps, forwards, clock)

    def model(self, shape: Shape, dtype: str, layout: str) -> List[Row]:
        """Training steps of a model with each of the norms."""
        device = self.args.device
        half = dtype != 'float32'
        models, steps, forwards = {}, {}, {}
        for name in self.args.norms:
            model, loss = make_model(self.args.model, shape, device, LAYOUTS[layout])
            models[name] = with_norm(model, name)
            autocast = torch.autocast(device.type, getattr(torch, dtype), enabled=half)
            forwards[name] = partial(autocast(loss), models[name])
            steps[name] = model_step(models[name], forwards[name])
        clock = measure.CudaStepClock() if device.type == 'cuda' else measure.CpuClock()
        setting = _setting(self.args.model, shape, dtype, layout)
        return self._race(setting, models, steps, forwards, clock)

    def similarity(self, batch: int, dtype: str) -> List[Row]:
        """The similarity of the layers and of the reference, for a fixed amount of numbers."""
        device, length = self.args.device, SIMILARITY_NUMBERS // batch
        x = torch.randn(batch, length, device=device, dtype=getattr(torch, dtype))

        def step_of(function: Callable) -> measure.Step:
            def step() -> Iterator[str]:
                function(x)
                yield 'similarity'

            return step

        functions = {'ubn': mean_cosine_similarity, 'literal': reference.mean_cosine_similarity}
        steps = {name: step_of(function) for name, function in functions.items()}
        clock = measure.CudaClock(device) if device.type == 'cuda' else measure.CpuClock()
        laps = measure.race(steps, clock, self.args.repeats, WARMUP, self.progress)
        setting = _setting('', (batch, length), dtype, '')
        return make_rows(self.run, setting, laps)

    def _race(
        self,
        setting: Row,
        modules: Dict[str, nn.Module],
        steps: Dict[str, measure.Step],
        forwards: Dict[str, Callable[[], torch.Tensor]],
        clock: object,
    ) -> List[Row]:
        device, is_model = self.args.device, bool(setting['model'])
        saved, peak, launches = {}, {}, None
        for name in list(steps):
            self.progress(f'memory, {name}')
            try:
                for _ in steps[name]():  # the first run also compiles and tunes
                    pass
                peak[name] = measure.peak_bytes(steps[name], device)
                saved[name] = measure.saved_bytes(forwards[name], modules[name])
            except torch.cuda.OutOfMemoryError:
                print(f'{name}: out of memory, left out', file=sys.stderr)
                del steps[name]
        if not steps:
            return []
        warmup = WARMUP_MODEL if is_model else WARMUP
        laps = measure.race(steps, clock, self.args.repeats, warmup, self.progress)
        # After the times, and not of a model on a GPU, whose times include the host's share: what
        # the profiler leaves behind slows all later launches (pytorch#144455).
        if not (is_model and device.type == 'cuda'):
            launches = {name: measure.launches(step, device) for name, step in steps.items()}
        return make_rows(self.run, setting, laps, saved, peak, launches)


def _setting(model: str, shape: Shape, dtype: str, layout: str) -> Row:
    return dict(model=model, shape=','.join(map(str, shape)), dtype=dtype, layout=layout)


class Progress:
    """Progress on stderr: in place on a terminal, elsewhere a line a setting and every 10 s."""

    def __init__(self) -> None:
        self._in_place = sys.stderr.isatty()
        self._title = ''
        self._last = 0.0

    def start(self, title: str) -> None:
        """Begins a setting."""
        self._title = title
        if not self._in_place:
            self._write(f'{title}\n')

    def __call__(self, text: str) -> None:
        if self._in_place:
            self._write(f'\r\033[K{self._title}: {text}')
        elif time.monotonic() - self._last > 10:
            self._write(f'{self._title}: {text}\n')

    def clear(self) -> None:
        """Makes room for a table."""
        if self._in_place:
            self._write('\r\033[K')

    def _write(self, text: str) -> None:
        self._last = time.monotonic()
        print(text, end='', file=sys.stderr, flush=True)


def run_all(bench: Bench, csv_file: Path) -> Tuple[List[Row], int]:
    """Measures every setting, writes and prints its rows as it ends.

    Returns:
        tuple: All rows, and the exit status: 1 where a setting failed, which is left out, 130 where
        Ctrl-C ended the run.

    Raises:
        CommandError: A package is missing.
    """
    rows: List[Row] = []
    settings, status = bench.settings(), 0
    try:
        for number, (method, choice) in enumerate(settings, 1):
            shown = ' '.join(str(part).replace(' ', '') for part in choice)
            bench.progress.start(f'[{number}/{len(settings)}] {shown}')
            try:
                new = method(*choice)
            except CommandError:
                raise
            except Exception:  # whatever it is, the other settings may go well
                bench.progress.clear()
                traceback.print_exc()
                status = 1
                continue
            append_csv(csv_file, new, COLUMNS)
            rows += new
            bench.progress.clear()
            if new:
                print(table(new), flush=True)
    except KeyboardInterrupt:
        bench.progress.clear()
        print(f'interrupted; what was measured is in {csv_file}', file=sys.stderr)
        status = 130
    return rows, status

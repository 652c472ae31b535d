"""Networks in evaluation with each norm, prepared and not, in each runtime."""

import argparse
import copy
import importlib.util
import statistics
import sys
import tempfile
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import markdown
from ..cli.errors import CommandError
from ..convert import convert_norm
from ..inference import prepare_for_inference
from ..inference.runtimes import NEEDS, RUNTIMES, Run, export_onnx
from .measure import CpuClock, Step, race
from .rows import Row, columns_of, describe_run, ratio_of
from .subjects import KINDS

NORMS = ('bn', 'bn_folded', 'ubn', 'ubn_prepared', 'ubn_converted')
NORMS += tuple(f'{kind}_prepared' for kind in KINDS if kind != 'ubn')
COLUMNS = (
    *('date', 'commit', 'device', 'torch', 'mmubn', 'onnxruntime', 'openvino'),
    *('model', 'size', 'runtime', 'batch', 'norm', 'rounds'),
    *('median_ms', 'p10_ms', 'p90_ms', 'images_per_s', 'ratio_bn_folded'),
    *('difference', 'onnx_nodes'),
)
# Norm, runtimes, and the most that its time may be of that of bn_folded; and ONNX nodes.
GOALS = (
    ('ubn_prepared', ('torch', 'torch, channels_last'), 1.20),
    ('ubn_prepared', ('onnxruntime',), 1.25),
    ('ubn_converted', tuple(RUNTIMES), 1.02),
)
MOST_NODES = 400
MARKS = '<!-- benchmark: begin -->', '<!-- benchmark: end -->'


def missing(runtime: str) -> List[str]:
    """What a runtime needs and is not installed."""
    return [name for name in NEEDS.get(runtime, ()) if importlib.util.find_spec(name) is None]


@torch.no_grad()
def make_models(name: str, size: int) -> Dict[str, nn.Module]:
    """A network with each of the norms, in evaluation; what is prepared is so beside the same."""
    from torchvision import models

    torch.manual_seed(0)
    bn = models.get_model(name, weights=None)
    _measure_statistics(bn, size)
    made = {'bn': bn, 'bn_folded': prepare_for_inference(bn)}
    for kind, layer in KINDS.items():
        model = convert_norm(copy.deepcopy(bn), dict(type=layer))
        if kind == 'ubn':
            made['ubn_converted'] = prepare_for_inference(model)
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                for parameter in module.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
        _measure_statistics(model, size)
        made[kind] = model
        made[f'{kind}_prepared'] = prepare_for_inference(model)
    return made


def _measure_statistics(model: nn.Module, size: int) -> None:
    """Running statistics of one batch of noise, with which no layer's output grows or dies."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1
    model.train()(torch.randn(8, 3, size, size))
    model.eval()
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum


class Bench:
    """Measures runtime after runtime.

    Args:
        args (argparse.Namespace): The options of tools/benchmark_inference.py.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.run = {key: value for key, value in _describe().items() if key in COLUMNS}
        self.nodes: Dict[str, str] = {}
        self._tell('making the models')
        models = make_models(args.model, args.size)
        self.models = {norm: models[norm] for norm in args.norms}
        # What each has to give: the output of the model that it was made of.
        origins = {'bn_folded': 'bn', 'ubn_converted': 'bn'}
        self.origins = {
            norm: models[origins.get(norm, norm.partition('_')[0])] for norm in args.norms
        }
        self.folder = tempfile.TemporaryDirectory()
        if any(NEEDS.get(runtime) for runtime in args.runtimes):
            self._export()

    def _tell(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def _file(self, norm: str) -> Path:
        return Path(self.folder.name) / f'{norm}.onnx'

    def _export(self) -> None:
        import onnx

        images = torch.rand(1, 3, self.args.size, self.args.size)
        for norm, model in self.models.items():
            self._tell(f'exporting {norm}')
            export_onnx(model, images, self._file(norm))
            self.nodes[norm] = str(len(onnx.load(self._file(norm)).graph.node))

    def rows(self) -> Iterator[List[Row]]:
        """The rows of each runtime and batch size, as they come."""
        for runtime in self.args.runtimes:
            for batch in self.args.batches:
                yield self._race(runtime, batch)

    def _race(self, runtime: str, batch: int) -> List[Row]:
        size = self.args.size
        images = torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
        steps, differences = {}, {}
        for norm, model in self.models.items():
            self._tell(f'{runtime}, batch {batch}: loading {norm}')
            with torch.no_grad():
                expected = self.origins[norm](images)
            # A copy, as channels_last changes the weights in place.
            run = RUNTIMES[runtime](copy.deepcopy(model), images, self._file(norm))
            differences[norm] = _difference(run(images), expected)
            if differences[norm] > 1e-3:
                raise CommandError(f'{runtime}, {norm}: outputs differ by {differences[norm]:.1e}')
            steps[norm] = _step(run, images)
        # A line a round: the programs that are timed wait for nothing else.
        tell = partial(self._round, f'{runtime}, batch {batch}', next(iter(steps)))
        laps = race(steps, CpuClock(), self.args.repeats, 2, tell)
        times = {norm: [lap['run'] for lap in rounds] for norm, rounds in laps.items()}
        rows = []
        for norm, values in times.items():
            row = dict.fromkeys(COLUMNS, '')
            row.update(self.run, model=self.args.model, size=str(size), runtime=runtime)
            row.update(batch=str(batch), norm=norm, **columns_of(values))
            row['images_per_s'] = f'{1e3 * batch / statistics.median(values):.5g}'
            if 'bn_folded' in times:
                row['ratio_bn_folded'] = ratio_of(values, times['bn_folded'])
            row.update(difference=f'{differences[norm]:.1e}')
            if NEEDS.get(runtime):
                row['onnx_nodes'] = self.nodes[norm]
            rows.append(row)
        return rows

    def _round(self, title: str, first: str, text: str) -> None:
        if text.endswith(f', {first}'):
            self._tell(f'{title}: {text.rpartition(",")[0]}')


def _step(run: Run, images: Tensor) -> Step:
    def step() -> Iterator[str]:
        run(images)
        yield 'run'

    return step


def _difference(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def _describe() -> Row:
    versions = {}
    for name in ('onnxruntime', 'openvino'):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = ''
    return {**describe_run(torch.device('cpu')), **versions}


def table(rows: Sequence[Row]) -> str:
    """Markdown: a table a batch size, a line a norm; a time and its ratio a runtime."""
    lines = []
    for batch in dict.fromkeys(row['batch'] for row in rows):
        here = [row for row in rows if row['batch'] == batch]
        runtimes = list(dict.fromkeys(row['runtime'] for row in here))
        unit = 'milliseconds' if batch == '1' else 'images a second'
        lines += ['', f'Batch {batch}, {unit}, and the time × that of `bn_folded`:', '']
        shown = []
        for norm in dict.fromkeys(row['norm'] for row in here):
            found = {row['runtime']: row for row in here if row['norm'] == norm}
            cells = (_cell(found.get(runtime), batch) for runtime in runtimes)
            shown.append((f'`{norm}`', *cells))
        lines += markdown.table(('', *runtimes), shown)
    nodes = {row['norm']: row['onnx_nodes'] for row in rows if row['onnx_nodes']}
    if nodes:
        shown = ', '.join(f'`{norm}` {count}' for norm, count in nodes.items())
        lines += ['', f'Nodes of the ONNX graph: {shown}.']
    return '\n'.join(lines[1:])


def _cell(row: Optional[Row], batch: str) -> str:
    if row is None:
        return ''
    number = float(row['median_ms'] if batch == '1' else row['images_per_s'])
    ratio = f', {float(row["ratio_bn_folded"]):.2f} ×' if row['ratio_bn_folded'] else ''
    return f'{number:.4g}{ratio}'


def goals(rows: Sequence[Row]) -> List[str]:
    """A line for each goal that the rows can tell about."""
    lines = []
    for norm, runtimes, limit in GOALS:
        for row in rows:
            if row['norm'] == norm and row['runtime'] in runtimes and row['ratio_bn_folded']:
                value = float(row['ratio_bn_folded'])
                lines.append(
                    f'{"reached" if value <= limit else "MISSED":8}{value:.3f} <= {limit}  {norm}, '
                    f'{row["runtime"]}, batch {row["batch"]}, × bn_folded'
                )
    nodes = {row['onnx_nodes'] for row in rows if row['norm'] == 'ubn_prepared'} - {''}
    for count in sorted(nodes):
        verdict = 'reached' if int(count) < MOST_NODES else 'MISSED'
        lines.append(f'{verdict:8}{count} < {MOST_NODES}  nodes of the ONNX graph, ubn_prepared')
    return lines


def write_docs(page: Path, rows: Sequence[Row]) -> None:
    """Puts the tables between the marks of a page."""
    before, _, rest = page.read_text(encoding='utf-8').partition(MARKS[0])
    _, mark, after = rest.partition(MARKS[1])
    first = rows[0]
    versions = ', '.join(
        f'{name} {first[name]}' for name in ('torch', 'onnxruntime', 'openvino') if first[name]
    )
    head = (
        f'{first["model"]}, {first["size"]}×{first["size"]} images, {first["device"]}, {versions}; '
        f'medians of {first["rounds"]} rounds, commit {first["commit"]}.'
    )
    parts = [before + MARKS[0], head, '', table(rows), mark + after]
    page.write_text('\n'.join(parts), encoding='utf-8')


def check_docs(page: Path) -> None:
    """Makes sure that :func:`write_docs` can write into a page.

    Raises:
        CommandError: The page has no marks.
    """
    text = page.read_text(encoding='utf-8') if page.is_file() else ''
    if not all(mark in text for mark in MARKS):
        raise CommandError(f'{page}: there is no {MARKS[0]} … {MARKS[1]} in it')

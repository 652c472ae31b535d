"""Tables of the paper's figures beside ours, as Markdown and CSV."""

import math
import statistics
from dataclasses import dataclass
from itertools import compress
from operator import methodcaller
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

from scipy.stats import t as student

from ..markdown import table
from ..runs import as_written
from ..writing import write_csv
from .experiments import EXPERIMENTS
from .logs import Run
from .rows import Row, name_among
from .run import Setting, as_arguments

CSV_COLUMNS = (
    *('experiment', 'paper_dataset', 'paper_model', 'norm', 'batch_size', 'metric'),
    *('paper', 'paper_minus_bn', 'host_bn', 'state', 'mean', 'sd', 'n'),
    *('minus_bn', 'ci95_low', 'ci95_high', 'pairs'),
    *('config', 'options', 'epochs', 'data', 'device'),
)
LAYER_COLUMNS = (
    *('experiment', 'setting', 'seed', 'epoch', 'layer', 'type', 'where'),
    *('similarity', 'running_similarity', 'batch_statistics_used'),
)
FIXED_BATCH = 'fixed/input'  # where the similarity is taken that a report has


@dataclass
class Line:
    """A row with its runs by seed."""

    row: Row
    setting: Setting
    runs: Dict[int, Run]

    @property
    def metrics(self) -> List[str]:
        """Those of the paper, else the usual ones of the data; of detection the loss too."""
        found = [metric for metric in self.row.paper if metric not in ('train_seconds', 'epochs')]
        if self.row.detects:
            zoo = list(self.row.zoo.values) if self.row.zoo else []
            return [*(found or zoo or ['bbox_AP']), 'loss']
        return found or ['top1']

    @property
    def state(self) -> str:
        """``3 done, 1 part`` or ``not run``."""
        states = [run.state for run in self.runs.values() if run.state != 'not run']
        counts = {state: states.count(state) for state in ('done', 'part')}
        return ', '.join(f'{n} {state}' for state, n in counts.items() if n) or 'not run'

    @property
    def done(self) -> Dict[int, Run]:
        """The finished runs."""
        return {seed: run for seed, run in self.runs.items() if run.state == 'done'}

    def finals(self, metric: str) -> Dict[int, float]:
        """Seed -> the metric after the last epoch."""
        values = {seed: run.final(metric) for seed, run in self.done.items()}
        return {seed: value for seed, value in values.items() if value is not None}

    def common_options(self, run: Run) -> List[str]:
        """A run's options without those of its row, and what a study chose for it."""
        own = {*as_arguments(self.setting.options)}
        is_tuned = EXPERIMENTS[self.row.experiment].is_tuned
        return [o for o in run.settings['options'] if o not in own and not is_tuned(o)]

    def conditions(self, run: Run) -> Dict[str, object]:
        """What a run must share with that of another row to be compared with it."""
        settings = run.settings
        found = {key: settings[key] for key in ('epochs', 'data') if key in settings}
        if 'flags' in settings:  # an older version did not write them
            found['flags'] = ' '.join(settings['flags']) or 'none'
        if 'gpus' in settings:
            found['GPUs'] = settings['gpus'] or 1  # 0: without a launcher
        if 'config_digest' in settings:  # rows with configs of their own differ in it
            found[f'content of {settings["config"]}.py'] = settings['config_digest']
        found['options'] = ' '.join(sorted(self.common_options(run))) or 'none'
        return found


def baseline(line: Line, lines: Sequence[Line]) -> Optional[Line]:
    """The line of the same with BN; None for BN itself or where there is none."""
    if line.row.norm == 'BN':
        return None
    return next((other for other in lines if other.row.is_baseline_of(line.row)), None)


def _name(line: Line, lines: Sequence[Line]) -> str:
    return name_among(line.row, [other.row for other in lines])


def mean_sd(values: Sequence[float]) -> Tuple[float, float]:
    """Mean and standard deviation of the sample; NaN where they are not defined."""
    if not all(map(math.isfinite, values)):  # of which statistics raises errors
        return sum(values) / len(values), math.nan
    mean = statistics.fmean(values) if values else math.nan
    return mean, statistics.stdev(values) if len(values) > 1 else math.nan


def paired(ours: Dict[int, float], other: Dict[int, float]) -> Tuple[float, float, int]:
    """Difference of the values of the same seeds.

    Returns:
        tuple: Mean, half the width of its 95 % interval of confidence (Student's t over
        the seeds; NaN for a single pair), number of pairs.
    """
    differences = [ours[seed] - other[seed] for seed in ours.keys() & other.keys()]
    n = len(differences)
    mean, sd = mean_sd(differences)
    half = float(student.ppf(0.975, n - 1)) * sd / math.sqrt(n) if n > 1 else math.nan
    return mean, half, n


def unequal(line: Line, other: Line) -> str:
    """In what the runs of the same seeds differ beside their rows; empty for nothing."""
    for seed in sorted(line.done.keys() & other.done.keys()):
        ours, theirs = (each.conditions(each.done[seed]) for each in (line, other))
        for key, value in ours.items():
            if key in theirs and theirs[key] != value:
                return f'{key} {value} and {theirs[key]}'
    return ''


def difference(
    line: Line, other: Line, values: Callable[[Line], Dict[int, float]]
) -> Tuple[float, float, int]:
    """As :func:`paired`, of the values by seed; without a pair where the runs are unequal."""
    return paired({}, {}) if unequal(line, other) else paired(values(line), values(other))


def not_compared(pairs: Iterable[Tuple[Line, Line]]) -> List[str]:
    """A line that says which differences are left out, and why, as Markdown; or none."""
    found = [(line, other, unequal(line, other)) for line, other in pairs]
    lines = [line for line, *_ in found]
    parts = [f'{_name(a, lines)} minus {b.row.norm} ({why})' for a, b, why in found if why]
    return ['', f'Not compared, since the runs differ: {"; ".join(parts)}.'] if parts else []


def with_baselines(lines: Sequence[Line]) -> List[Tuple[Line, Line]]:
    """Each line that has one, and its :func:`baseline`."""
    return [(line, bn) for line in lines if (bn := baseline(line, lines)) is not None]


def cells(line: Line, lines: Sequence[Line]) -> Iterator[Dict[str, object]]:
    """A dict of :data:`CSV_COLUMNS` for each metric of a line."""
    row, bn = line.row, baseline(line, lines)
    for metric in line.metrics:
        cell: Dict[str, object] = dict.fromkeys(CSV_COLUMNS, '')
        cell.update(experiment=row.experiment, paper_dataset=row.dataset, norm=row.norm)
        cell.update(paper_model=row.model, batch_size=row.batch_size or '', metric=metric)
        cell.update(state=line.state, config=line.setting.config.stem)
        paper = row.paper.get(metric)
        if paper is not None:
            cell['paper'] = paper
            if bn is not None and metric in bn.row.paper:
                cell['paper_minus_bn'] = round(paper - bn.row.paper[metric], 2)
        if row.zoo is not None:
            cell['host_bn'] = row.zoo.values.get(metric, '')
        finals = line.finals(metric)
        if len(finals) < len(line.done):
            cell['state'] = f'{line.state}, {len(line.done) - len(finals)} without a value'
        if finals:
            mean, sd = mean_sd(list(finals.values()))
            # A mean that is not finite says that a run diverged.
            cell.update(mean=round(mean, 2), sd=_rounded(sd), n=len(finals))
            settings = next(iter(line.done.values())).settings
            cell['options'] = ' '.join(settings['options'])
            cell.update({key: settings[key] for key in ('epochs', 'data', 'device')})
        if finals and bn is not None:
            names = 'minus_bn', 'ci95_low', 'ci95_high', 'pairs'
            cell.update(zip(names, _interval(line, bn, methodcaller('finals', metric))))
        yield cell


def _interval(
    line: Line, other: Line, values: Callable[[Line], Dict[int, float]]
) -> Tuple[object, ...]:
    """Mean, low, high and number of pairs, rounded, empty where undefined."""
    mean, half, n = difference(line, other, values)
    return *map(_rounded, (mean, mean - half, mean + half)), n or ''


def _rounded(value: float) -> object:
    return '' if math.isnan(value) else round(value, 2)


def _shown(value: object, form: str) -> str:
    return format(value, form) if value != '' else ''


def speed(lines: Sequence[Line]) -> List[str]:
    """Table 8 as Markdown: time and epochs until BN's final accuracy, seed by seed."""
    rows = []
    for line, bn in with_baselines(lines):
        values = [f'{line.row.dataset}, {line.row.model}']
        for side in (bn, line):
            paper = side.row.paper
            values.append(f'{paper["epochs"]:g} epochs, {paper["train_seconds"]:g} s')
        metric = line.metrics[0]
        seeds = sorted(line.finals(metric).keys() & bn.finals(metric).keys())
        if unequal(line, bn):
            values += [''] * 4
        else:
            values += _speed_cells(bn, line, seeds) if seeds else ['not run'] * 4
        rows.append(values)
    header = ['network of the paper', 'paper: BN', 'paper: UBN', 'ours: BN']
    header += ['BN itself first at', 'UBN first at', 'UBN seconds by BN seconds']
    return [*table(header, rows), *not_compared(with_baselines(lines))]


def _speed_cells(bn: Line, line: Line, seeds: Sequence[int]) -> List[str]:
    metric = line.metrics[0]
    whole, firsts_of_bn, firsts = [], [], []
    for seed in seeds:
        target = bn.runs[seed].final(metric)
        last = bn.runs[seed].settings['epochs']
        whole.append((last, bn.runs[seed].seconds[last]))
        for found, run in ((firsts_of_bn, bn.runs[seed]), (firsts, line.runs[seed])):
            epoch = run.epoch_reaching(metric, target)
            if epoch:
                found.append((epoch, run.seconds[epoch]))
    ratios = [_epoch_seconds(line.runs[seed]) / _epoch_seconds(bn.runs[seed]) for seed in seeds]
    return [
        *(_epochs_and_seconds(found, len(seeds)) for found in (whole, firsts_of_bn, firsts)),
        f'{statistics.fmean(ratios):.2f} an epoch',
    ]


def _epoch_seconds(run: Run) -> float:
    return run.seconds[run.epoch] / run.epoch


def _epochs_and_seconds(found: Sequence[Tuple[int, float]], n: int) -> str:
    if not found:
        return f'in none of {n}'
    epochs, seconds = zip(*found)
    among = '' if len(found) == n else f' (in {len(found)} of {n})'
    return f'{statistics.fmean(epochs):.1f} epochs, {statistics.fmean(seconds):.1f} s{among}'


def markdown(by_experiment: Dict[str, List[Line]], one_network: bool) -> str:
    """The whole report."""
    text = [
        '# Report',
        '',
        'Ours: mean ± standard deviation over the seeds of the value after the last epoch. '
        'Ours minus BN: mean of the differences of the same seeds, in brackets its 95 % interval '
        'of confidence by Student’s t.',
    ]
    before: List[str] = []
    for name, lines in by_experiment.items():
        experiment = EXPERIMENTS[name]
        paper = dict.fromkeys(f'{line.row.model} on {line.row.dataset}' for line in lines)
        source = 'Network' if experiment.is_ours else 'Paper'
        text += ['', f'## {experiment.title}', '', f'{source}: {", ".join(paper)}.', '']
        conditions = _conditions(lines)
        text += ['Ours: as above.'] if conditions == before else conditions
        text += ['']
        before = conditions
        if experiment.is_speed:
            text += speed(lines)
            continue
        text += _values(lines, one_network)
        text += contrasts(lines)
        if 'condensation' in experiment.plots:
            text += condensation(lines)
        text += zoo_notes(lines)
    return '\n'.join(text) + '\n'


def _values(lines: Sequence[Line], one_network: bool) -> List[str]:
    """A row for each line and metric, as Markdown; of others only columns with values."""
    rows = []
    for line in lines:
        name = _name(line, () if one_network else lines)
        for cell in cells(line, lines):
            row = [name, cell['metric'], _shown(cell['paper'], '.4g')]
            row += [_shown(cell['paper_minus_bn'], '+.2f'), _shown(cell['host_bn'], '.4g')]
            sd = '' if cell['sd'] == '' else f' ± {cell["sd"]:.2f}'
            row += [_shown(cell['mean'], '.2f') + sd, cell['state']]
            row += [_difference(cell['minus_bn'], cell['ci95_low'], cell['ci95_high'])]
            rows.append(row)
    of_others = 'paper', 'paper minus BN', "host's own BN"
    header = 'row', 'metric', *of_others, 'ours', 'runs', 'ours minus BN'
    shown = [name not in of_others or any(column) for name, column in zip(header, zip(*rows))]
    chosen = (list(compress(row, shown)) for row in (header, *rows))
    return [*table(next(chosen), chosen), *not_compared(with_baselines(lines))]


def condensation(lines: Sequence[Line]) -> List[str]:
    """Mean similarity of the layers on the fixed batch after training, as Markdown."""
    rows = []
    for line in lines:
        finals = _similarities(line)
        if not finals:
            continue
        bn = baseline(line, lines)
        shown = _difference(*_interval(line, bn, _similarities)[:3]) if bn is not None else ''
        mean, sd = mean_sd(list(finals.values()))
        spread = '' if math.isnan(sd) else f' ± {sd:.2f}'
        rows.append((_name(line, lines), f'{mean:.2f}{spread}', len(finals), shown))
    if not rows:
        return []
    title = (
        'Condensation: similarity of the fixed batch (`fixed/input`) after the last epoch, mean '
        'over the layers.'
    )
    return ['', title, '', *table(('row', 'similarity × 100', 'runs', 'minus BN'), rows)]


def _similarities(line: Line) -> Dict[int, float]:
    """Seed -> mean over the layers in the last epoch, times 100."""
    found = {}
    for seed, run in line.done.items():
        rows = of_fixed_batch(run)
        values = [row['similarity'] for row in rows if row['similarity'] is not None]
        if values:
            found[seed] = 100 * statistics.fmean(values)
    return found


def of_fixed_batch(run: Run) -> List[Dict[str, Any]]:
    """The rows of the condensation table that the report goes by."""
    return [row for row in run.last_condensation if row['where'] == FIXED_BATCH]


def zoo_notes(lines: Sequence[Line]) -> List[str]:
    """Where the column of the host's own BN comes from, as Markdown; empty without it."""
    found = {(line.row.dataset, line.row.model): line.row.zoo for line in lines if line.row.zoo}
    text = []
    for (dataset, model), zoo in found.items():
        note = f'; {zoo.note}' if zoo.note else ''
        text.append(f'- {model} on {dataset}: `{zoo.config}`, {zoo.version}{note}')
    header = ['', "Host's own BN: what the metafile of the host's model zoo says.", '']
    return [*header, *text] if text else []


def contrasts(lines: Sequence[Line]) -> List[str]:
    """Differences between rows neither of which need be BN, as Markdown; empty without such."""
    rows = []
    pairs = []
    for line in lines:
        row = line.row
        wanted = [b for a, b in EXPERIMENTS[row.experiment].contrasts if a == row.norm]
        others = {other.row.norm: other for other in lines if other.row.differs_in_norm(row)}
        for other in (others[norm] for norm in wanted if norm in others):
            metric = line.metrics[0]
            shown = _difference(*_interval(line, other, methodcaller('finals', metric))[:3])
            missing = '' if unequal(line, other) else 'not run'
            rows.append((_name(line, lines), other.row.norm, metric, shown or missing))
            pairs.append((line, other))
    if not rows:
        return []
    return ['', *table(('row', 'minus', 'metric', 'difference'), rows), *not_compared(pairs)]


def _difference(mean: object, low: object, high: object) -> str:
    interval = f' [{low:+.2f}, {high:+.2f}]' if low != '' else ''
    return _shown(mean, '+.2f') + interval


def _conditions(lines: Sequence[Line]) -> List[str]:
    """What ours were measured on."""
    groups: Dict[Tuple, set] = {}
    for line in lines:
        for seed, run in line.done.items():
            s = run.settings
            key = s['config'] if '-' in line.setting.name else '', s['epochs'], s['data']
            key += s['device'], s['torch'], s['commit'], ' '.join(line.common_options(run))
            groups.setdefault(key, set()).add(seed)
    text = []
    for (config, epochs, data, device, torch, commit, options), seeds in groups.items():
        parts = [f'`{config}`' if config else 'each row its config', f'{epochs} epochs']
        parts += [f'data `{data}`', f'seeds {", ".join(map(str, sorted(seeds)))}', device]
        parts += [f'torch {torch}', f'commit {commit}']
        parts += [f'options `{options}`'] if options else []
        text += [f'Ours: {"; ".join(parts)}.', '']
    return text[:-1] or ['Ours: not run.']


def write_tables(by_experiment: Dict[str, List[Line]], out: Path, one_network: bool) -> List[Path]:
    """Writes the report.

    ``report.md`` and ``report.csv`` have the rows, ``curves.csv`` every epoch of every run,
    ``layers.csv`` what CondensationHook saw of each layer in the last epoch. In both a run
    that several experiments share stands once, under the first of them.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / 'report.md').write_text(markdown(by_experiment, one_network), encoding='utf-8')
    pairs = [(line, lines) for lines in by_experiment.values() for line in lines]
    rows = (cell.values() for line, lines in pairs for cell in cells(line, lines))
    write_csv(out / 'report.csv', CSV_COLUMNS, rows)
    # Studies have settings of the same names in other folders.
    named: Dict[Path, Tuple[Tuple[str, str, int], Run]] = {}
    for line, _ in pairs:
        for seed, run in line.runs.items():
            names = line.row.experiment, line.setting.name, seed
            named.setdefault(run.folder, (names, run))
    curves = (
        (*names, epoch, f'{run.seconds.get(epoch, math.nan):.2f}', metric, f'{value:.4g}')
        for names, run in named.values()
        for metric, curve in run.curves.items()
        for epoch, value in curve.items()
    )
    write_csv(out / 'curves.csv', (*LAYER_COLUMNS[:4], 'train_seconds', 'metric', 'value'), curves)
    layers = (
        (*names, *(as_written(layer)[column] for column in LAYER_COLUMNS[3:]))
        for names, run in named.values()
        for layer in (run.last_condensation if run.state == 'done' else ())
    )
    write_csv(out / 'layers.csv', LAYER_COLUMNS, layers)
    return [out / name for name in ('report.md', 'report.csv', 'curves.csv', 'layers.csv')]

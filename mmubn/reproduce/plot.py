"""Pictures of the report: accuracy by epoch and time, differences, thresholds, batch sizes."""

from operator import methodcaller
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .. import plot_condensation
from .experiments import EXPERIMENTS
from .report import FIXED_BATCH, Line, difference, mean_sd, of_fixed_batch, with_baselines
from .rows import several

DASHES = ['-', '--', ':', '-.', (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 3))]


def draw(by_experiment: Dict[str, List[Line]], out: Path, one_network: bool) -> List[Path]:
    """Draws what the runs suffice for.

    Args:
        by_experiment (dict): Experiment -> its lines.
        out (Path): Folder of the PNG files.
        one_network (bool): All runs are of one config: the titles name that, since
            those of the experiments name the paper's data.

    Returns:
        list[Path]: The PNG files.
    """
    written = []
    for experiment, lines in by_experiment.items():
        have = [line for line in lines if line.done]
        figures: Dict[str, Optional[Figure]] = {}
        for plot in EXPERIMENTS[experiment].plots:
            figures.update(PLOTS[plot](have, one_network))
        for name, figure in figures.items():
            path = out / f'{experiment}_{name}.png'
            if figure is None:
                path.unlink(missing_ok=True)  # of an earlier report
                continue
            if not figure.get_suptitle():
                figure.suptitle(_title(experiment, have, one_network), fontsize=9)
            figure.savefig(path, dpi=110)
            written.append(path)
    return written


def _title(experiment: str, lines: Sequence[Line], one_network: bool) -> str:
    if not one_network:
        return EXPERIMENTS[experiment].title
    ours = next(iter(lines[0].done.values())).settings
    what = EXPERIMENTS[experiment].title.split(':')[0]
    text = f'{what}, with {ours["config"]}, data {ours["data"]}, {ours["epochs"]} epochs'
    return plot_condensation.literal(text)


def _name(line: Line, lines: Sequence[Line]) -> str:
    rows = [other.row for other in lines]
    return f'{line.row.model}, {line.row.name}' if several(rows) else line.row.name


def _curves(
    lines: Sequence[Line], by: str, unit: str, metric: Optional[str] = None
) -> Optional[Figure]:
    """Mean over the seeds, and their range as a band, of a metric or the first one."""
    if not lines:
        return None
    metric = metric or lines[0].metrics[0]
    having = [(line, [run for run in line.done.values() if metric in run.curves]) for line in lines]
    if not any(runs for _, runs in having):
        return None
    axis = Figure(figsize=(6.4, 4), layout='constrained').subplots()
    for number, (line, runs) in enumerate(having):
        if not runs:
            continue
        epochs = sorted(set.intersection(*(set(run.curves[metric]) for run in runs)))
        values = np.array([[run.curves[metric][epoch] for epoch in epochs] for run in runs])
        x = epochs
        if by == 'time':
            x = np.mean([[run.seconds[epoch] for epoch in epochs] for run in runs], axis=0)
        style = dict(color=f'C{number % 10}', linestyle=DASHES[number % len(DASHES)])
        axis.plot(x, values.mean(0), label=_name(line, lines), linewidth=1.3, **style)
        axis.fill_between(x, values.min(0), values.max(0), alpha=0.12, color=style['color'])
    what = 'training loss' if metric == 'loss' else f'{metric}, %'
    axis.set(xlabel=unit, ylabel=f'{what} (mean and range of the seeds)')
    return _finish(axis)


def _differences(lines: Sequence[Line]) -> Optional[Figure]:
    """Norm minus BN: ours with its interval of confidence, and the paper's."""
    found = []
    for line, bn in with_baselines(lines):
        mean, half, pairs = difference(line, bn, methodcaller('finals', line.metrics[0]))
        if pairs:
            found.append((line, bn, mean, half))
    if not found:
        return None
    axis = Figure(figsize=(6.4, 0.9 + 0.35 * len(found)), layout='constrained').subplots()
    for number, (line, bn, mean, half) in enumerate(found):
        metric = line.metrics[0]
        label = 'ours, 95 % interval' if not number else None
        axis.errorbar(mean, number, xerr=half, fmt='o', color='black', capsize=3, label=label)
        if metric in line.row.paper and metric in bn.row.paper:
            paper = line.row.paper[metric] - bn.row.paper[metric]
            label = 'paper' if not number else None
            axis.plot(paper, number, 'D', color='C3', markerfacecolor='white', label=label)
    axis.axvline(0, color='0.6', linewidth=0.8)
    axis.set_yticks(range(len(found)), [_name(line, lines) for line, *_ in found], fontsize=8)
    axis.set_ylim(len(found) - 0.5, -0.5)  # the first on top
    axis.set_xlabel(f'{metric} minus that of BN, percentage points')
    return _finish(axis)


def _threshold(line: Line) -> Optional[float]:
    return line.row.norm_cfg['fct'] if line.row.base == 'UBN' else None


def _against(
    lines: Sequence[Line],
    unit: str,
    place: Callable[[Line], Optional[float]],
    one_network: bool,
    log: bool,
) -> Optional[Figure]:
    """The final metric over a setting; a line without it, BN, lies across."""
    if not lines:
        return None
    metric = lines[0].metrics[0]
    axis = Figure(figsize=(6.4, 3.6), layout='constrained').subplots()
    groups: Dict[str, List[Line]] = {}
    for line in lines:
        paper = '' if one_network else f'{line.row.dataset}, {line.row.model}, '
        # Thresholds are a curve of one norm, batch sizes a curve each.
        groups.setdefault(paper + (line.row.norm if log else line.row.base), []).append(line)
    for number, (name, group) in enumerate(groups.items()):
        color = f'C{number % 10}'
        points = [(place(line), *mean_sd([*line.finals(metric).values()])) for line in group]
        if points[0][0] is None:
            axis.axhline(points[0][1], color=color, linestyle='--', label=name)
            continue
        x, mean, sd = zip(*sorted(points))
        axis.errorbar(x, mean, sd, marker='o', capsize=3, color=color, label=f'{name} (± sd)')
    if log:
        axis.set_xscale('log', base=2)
    axis.set(xlabel=unit, ylabel=f'{metric}, %')
    return _finish(axis)


def _finish(axis: Axes) -> Figure:
    axis.legend(frameon=False, fontsize=7)
    axis.spines[['top', 'right']].set_visible(False)
    return axis.figure


def _condensation(lines: Sequence[Line], one_network: bool) -> Dict[str, Optional[Figure]]:
    """The first seed of each row that recorded it, as :mod:`mmubn.plot_condensation` draws it."""
    shown = FIXED_BATCH, 0.3
    runs = []
    for line in lines:
        first = next((run for run in line.done.values() if of_fixed_batch(run)), None)
        if first is not None:
            run = plot_condensation.Run(first.folder)
            run.name = _name(line, lines)
            runs.append(run)
    if not runs:
        return dict.fromkeys(('condensation', 'layers'))
    metric = plot_condensation.choose_metric(runs)
    return {
        'condensation': plot_condensation.draw_curves(runs, *shown, metric),
        'layers': plot_condensation.draw_layers(runs, *shown),
    }


# What a name among the plots of an experiment draws: name of the picture -> picture.
PLOTS: Dict[str, Callable[[Sequence[Line], bool], Dict[str, Optional[Figure]]]] = {
    'curves': lambda lines, one_network: {
        'epochs': _curves(lines, 'epochs', 'epoch'),
        'time': _curves(lines, 'time', 'seconds of training'),
    },
    'loss': lambda lines, one_network: {'loss': _curves(lines, 'epochs', 'epoch', 'loss')},
    'differences': lambda lines, one_network: {'differences': _differences(lines)},
    'thresholds': lambda lines, one_network: {
        'thresholds': _against(lines, 'threshold FCT', _threshold, one_network, log=False)
    },
    'batch_sizes': lambda lines, one_network: {
        'batch_sizes': _against(
            lines, 'batch size', lambda line: line.row.batch_size, one_network, log=True
        )
    },
    'condensation': _condensation,
}

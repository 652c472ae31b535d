"""Draws what CondensationHook recorded: curves, a heat map of the layers, and the gates.

Needs matplotlib; the pictures are legible in black and white.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import List, Optional, Tuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from .cli.errors import CommandError, user_error
from .runs import TABLE, read_condensation, read_scalars, table_of

METRICS = ('accuracy/top1', 'coco/segm_mAP', 'coco/bbox_mAP')
# Told apart without colour: by dashes and marker, in 20 combinations, and by shade.
DASHES = ('-', '--', ':', '-.')
MARKERS = ('o', 's', '^', 'D', 'v')
AXES = {'epoch': 'epoch', 'iter': 'iteration'}
ROW_HEIGHT, MAX_HEIGHT = 0.14, 14  # inches


@dataclass
class Table:
    """Values by layer and time; NaN where there is none."""

    layers: List[str]
    times: List[int]
    values: np.ndarray


class Run:
    """One work dir: its condensation table and the metrics of its logs.

    Args:
        path (Path): The work dir, or the table in it. A table that was put aside has no metrics:
            the logs are those of the training after it.

    Raises:
        CommandError: There is no table, or no row in it.
    """

    def __init__(self, path: Path) -> None:
        with user_error(FileNotFoundError, ValueError):
            self.rows = read_condensation(path)
        self.path = path
        self.table_path = table_of(path)
        self.folder = self.table_path.parent
        if not self.rows:
            raise CommandError(f'{self.table_path}: holds no record yet')
        self.name = self.folder.resolve().name
        # An iteration-based loop counts no epochs.
        self.axis = 'epoch' if self.rows[-1]['epoch'] else 'iter'
        is_last = self.table_path.name == TABLE
        self.metrics = read_scalars(self.folder).metrics if is_last else {}

    @property
    def label(self) -> str:
        """Its name, as the pictures take it."""
        return literal(self.name)

    def table(self, where: str, column: str = 'similarity') -> Table:
        """A column of the rows of one place."""
        rows = [row for row in self.rows if row['where'] == where]
        layers = list(dict.fromkeys(row['layer'] for row in rows))
        times = list(dict.fromkeys(row[self.axis] for row in rows))
        values = np.full((len(layers), len(times)), np.nan)
        for row in rows:
            if row[column] is not None:
                values[layers.index(row['layer']), times.index(row[self.axis])] = row[column]
        return Table(layers, times, values)

    def gates(self) -> Table:
        """The share of steps with batch statistics, for the layers that have a gate."""
        table = self.table('train/input', 'batch_statistics_used')
        gated = ~np.isnan(table.values).all(axis=1)
        layers = [layer for layer, has in zip(table.layers, gated) if has]
        return Table(layers, table.times, table.values[gated])


def choose_metric(runs: List[Run], wanted: Optional[str] = None) -> Optional[str]:
    """The metric to draw: the wanted one, else the first of the usual that a run has.

    Raises:
        CommandError: No run has the wanted one.
    """
    found = {name for run in runs for name in run.metrics}
    if wanted is not None and wanted not in found:
        raise CommandError(
            f'--metric {wanted} is in no log; there is {", ".join(sorted(found)) or "none"}'
        )
    return wanted or next((name for name in METRICS if name in found), None)


def draw_curves(runs: List[Run], where: str, threshold: float, metric: Optional[str]) -> Figure:
    """Mean similarity of the layers over time, under the metric of the runs."""
    panels = 1 if metric is None else 2
    figure = Figure(figsize=(6.4, 2.6 * panels + 0.6), layout='constrained')
    axes = figure.subplots(panels, 1, sharex=True, squeeze=False)
    *above, below = axes[:, 0]
    for number, run in enumerate(runs):
        style = _style(number)
        table = run.table(where)
        below.plot(table.times, _mean(table.values), label=run.label, **style)
        for panel in above:
            curve = run.metrics.get(metric, {})
            panel.plot(list(curve), list(curve.values()), label=run.label, **style)
    below.axhline(threshold, color='0.6', linewidth=0.8)
    below.annotate(
        f'condensed\nabove {threshold:g}',
        (1, threshold),
        xycoords=('axes fraction', 'data'),
        xytext=(4, 0),
        textcoords='offset points',
        va='center',
        fontsize=7,
    )
    below.set_ylabel(f'mean cosine similarity\n({where})')
    for panel in above:
        panel.set_ylabel(metric)
    _finish(axes[0, 0], below, runs)
    return figure


def draw_layers(runs: List[Run], where: str, threshold: float) -> Figure:
    """Similarity of every layer over time; a dot marks a condensed one."""
    tables = [run.table(where) for run in runs]
    figure, panels = _heat_maps(runs, tables, f'cosine similarity ({where})')
    for panel, table in zip(panels, tables):
        rows, columns = np.nonzero(np.nan_to_num(table.values) > threshold)
        shades = ['white' if table.values[at] > 0.6 else 'black' for at in zip(rows, columns)]
        panel.scatter(columns, rows, s=3, c=shades, linewidths=0)
    figure.suptitle(f'dot: condensed, similarity above {threshold:g}', fontsize=8)
    return figure


def draw_gates(runs: List[Run]) -> Figure:
    """The share of gates that are open over time, above every layer's gate."""
    tables = [run.gates() for run in runs]
    label = 'share of steps with batch statistics\n(1: gate open)'
    figure, _ = _heat_maps(runs, tables, label, above='open')
    top = figure.axes[0]
    for number, (run, table) in enumerate(zip(runs, tables)):
        top.plot(table.times, _mean(table.values), label=run.label, **_style(number))
    top.set_ylabel('open gates')
    top.set_ylim(-0.05, 1.05)
    top.yaxis.set_major_formatter(PercentFormatter(1))
    _finish(top, top, runs)
    return figure


def _mean(values: np.ndarray) -> np.ndarray:
    """Over layers, NaN where no layer has a value."""
    counts = (~np.isnan(values)).sum(axis=0)
    return np.where(counts > 0, np.nansum(values, axis=0) / np.maximum(counts, 1), np.nan)


def _style(number: int) -> dict:
    color = ('black', '0.45')[number % 2]
    return dict(
        linestyle=DASHES[number % len(DASHES)],
        marker=MARKERS[number % len(MARKERS)],
        color=color,
        markerfacecolor=color if number % 4 in (0, 3) else 'white',
        markersize=4,
        linewidth=1.4,
    )


def literal(text: str) -> str:
    """Text that matplotlib draws as it stands, in a legend too.

    It takes ``$`` for mathematics, and leaves names that begin with ``_`` out of legends.
    """
    text = text.replace('$', r'\$')
    return f' {text}' if text.startswith('_') else text


def _shared_axis(runs: List[Run]) -> str:
    """What all runs count; one that has recorded nothing but its start may count either."""
    counting = {run.axis: run for run in runs if run.rows[-1]['iter']}
    if len(counting) > 1:
        raise CommandError(
            f'{counting["epoch"].path} counts epochs and {counting["iter"].path} iterations: '
            'draw them in two calls'
        )
    return next(iter(counting), runs[0].axis)


def _finish(top: Axes, bottom: Axes, runs: List[Run]) -> None:
    bottom.set_xlabel(AXES[_shared_axis(runs)])
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    top.legend(frameon=False, fontsize=8)
    for axis in (top, bottom):
        axis.spines[['top', 'right']].set_visible(False)


def _heat_maps(
    runs: List[Run], tables: List[Table], label: str, above: Optional[str] = None
) -> Tuple[Figure, List[Axes]]:
    """Panels side by side, layers named once where all runs have the same."""
    rows = max(len(table.layers) for table in tables)
    height = min(rows * ROW_HEIGHT + 1.2, MAX_HEIGHT)
    names = [str(number) for number in range(len(runs))]
    mosaic, heights = [names], [height]
    if above is not None:
        mosaic, heights = [[above] * len(names), names], [2.2, height]
    figure = Figure(figsize=(2.4 + 2.8 * len(runs), sum(heights)), layout='constrained')
    axes = figure.subplot_mosaic(mosaic, height_ratios=heights)
    panels = [axes[name] for name in names]
    for panel, run, table in zip(panels, runs, tables):
        image = panel.imshow(table.values, cmap='gray_r', vmin=0, vmax=1, aspect='auto')
        panel.set_facecolor('lightsteelblue')  # where there is no value
        panel.set_title(run.label, fontsize=9)
        panel.set_xlabel(AXES[run.axis])
        every = math.ceil(len(table.times) / 8)
        panel.set_xticks(range(0, len(table.times), every), table.times[::every], fontsize=8)
        every = math.ceil(rows * ROW_HEIGHT / MAX_HEIGHT)
        panel.set_yticks(range(0, len(table.layers), every), table.layers[::every], fontsize=6)
        if panel is not panels[0] and table.layers == tables[0].layers:
            panel.tick_params(labelleft=False)
    figure.colorbar(image, ax=panels, shrink=0.7, label=label)
    return figure, panels

"""A picture of the ratios to BatchNorm."""

from pathlib import Path
from typing import Any, List, Tuple

from ..cli.errors import CommandError
from ..writing import check_file
from .rows import SETTING, TOTALS, Row

# Told apart without colour.
MARKERS = ('o', 's', '^', 'D', 'v', 'P', 'X', '<', '>', 'p', 'h', '*')


def plot(rows: List[Row], path: Path) -> None:
    """Saves :func:`draw_ratios` as ``path``."""
    figure = draw_ratios(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)


def check_picture(option: str, path: Path) -> None:
    """Whether matplotlib is there and can save a picture under this name.

    Args:
        option (str): What the user named it by.
        path (Path): Where the picture goes.

    Raises:
        CommandError: There is no matplotlib, or it cannot save there.
    """
    Figure, _ = _matplotlib()
    known = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        suffixes = ', '.join(f'.{suffix}' for suffix in known)
        raise CommandError(f'{option}: {path} must end with one of {suffixes}')
    check_file(option, path)


def _matplotlib() -> Tuple[Any, Any]:
    """Its class of figures, and its module of ticks."""
    try:
        from matplotlib import ticker
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CommandError(f'a plot needs matplotlib: pip install matplotlib ({error})') from error
    return Figure, ticker


def draw_ratios(rows: List[Row]) -> Any:
    """Ratio to BatchNorm of forward and backward together: a line a setting, a mark a norm.

    Args:
        rows (list[dict]): Of one run.

    Returns:
        matplotlib.figure.Figure: The figure.

    Raises:
        CommandError: There is no matplotlib, or no ratio to draw.
    """
    Figure, ticker = _matplotlib()
    rows = [r for r in rows if r['what'] in TOTALS and r['ratio_bn'] and r['norm'] != 'bn']
    if not rows:
        raise CommandError('nothing to plot: no row has a ratio to bn')
    labels = [' '.join(filter(None, (row[key] for key in SETTING))) for row in rows]
    places = {label: place for place, label in enumerate(dict.fromkeys(labels))}
    figure = Figure(figsize=(7, 1.6 + 0.24 * len(places)), layout='constrained')
    axes = figure.subplots()
    axes.axvline(1, color='black', linewidth=0.8)
    for marker, norm in zip(MARKERS, dict.fromkeys(row['norm'] for row in rows)):
        chosen = [(row, label) for row, label in zip(rows, labels) if row['norm'] == norm]
        axes.scatter(
            [float(row['ratio_bn']) for row, _ in chosen],
            [places[label] for _, label in chosen],
            marker=marker,
            facecolors='black' if norm == 'ubn' else 'white',
            edgecolors='black',
            label=norm,
            zorder=2,
        )
    axes.set_xscale('log')
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.2, 1.5, 2, 3, 5)))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.xaxis.set_major_formatter(ticker.FormatStrFormatter('%g'))
    axes.set_xlabel('time of forward and backward, x BatchNorm')
    axes.set_yticks(range(len(places)), places, fontsize=7)
    axes.invert_yaxis()
    axes.grid(axis='y', color='0.85', linewidth=0.6)
    axes.set_title(f'{rows[0]["device"]}, torch {rows[0]["torch"]}', fontsize=9)
    figure.legend(loc='outside lower center', ncols=4, frameon=False, fontsize=8)
    return figure

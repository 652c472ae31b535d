"""Draws what CondensationHook recorded: curves, a heat map of the layers, and the gates.

    python tools/plot_condensation.py work_dirs/bn work_dirs/ubn --out pictures

writes, as PNG and SVG and legible in black and white,

- ``condensation_curves``: mean similarity of the layers over time, one line a run,
  under the accuracy or AP of the same runs where their logs have one;
- ``condensation_layers``: similarity of every layer over time, a panel a run;
- ``condensation_gates``: which gates are open (batch statistics) over time, where a
  run has gates (UBN).
"""

import argparse
from pathlib import Path
from typing import List, Optional

from matplotlib.figure import Figure

from mmubn.cli.errors import CommandError, command
from mmubn.plot_condensation import Run, choose_metric, draw_curves, draw_gates, draw_layers
from mmubn.runs import PLACES
from mmubn.writing import check_folder


@command
def main(arguments: Optional[List[str]] = None) -> None:
    """Reads the command line, draws and saves."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'work_dirs', type=Path, nargs='+', metavar='WORK_DIR', help='or its condensation.csv'
    )
    parser.add_argument('--out', type=Path, help='folder of the pictures (first WORK_DIR)')
    parser.add_argument(
        '--where', choices=PLACES, default='fixed/input', help='what to draw (%(default)s)'
    )
    parser.add_argument('--metric', help='scalar drawn on top (accuracy, else mask or box AP)')
    parser.add_argument(
        '--threshold',
        type=float,
        default=0.3,
        help='similarity above which a layer is condensed (%(default)s)',
    )
    args = parser.parse_args(arguments)

    runs = [Run(path) for path in args.work_dirs]
    out = args.out or runs[0].folder
    check_folder('--out', out)
    if len({run.name for run in runs}) < len(runs):
        for run in runs:
            run.name = str(run.path)
    for run in runs:
        if not run.table(args.where).layers:
            places = ', '.join(sorted({row['where'] for row in run.rows})) or 'none'
            raise CommandError(
                f'{run.table_path}: no rows of --where {args.where}; it has {places}'
            )
    out.mkdir(parents=True, exist_ok=True)
    metric = choose_metric(runs, args.metric)
    curves = draw_curves(runs, args.where, args.threshold, metric)
    _save(curves, out, 'condensation_curves')
    _save(draw_layers(runs, args.where, args.threshold), out, 'condensation_layers')
    gated = [run for run in runs if run.gates().layers]
    if gated:
        _save(draw_gates(gated), out, 'condensation_gates')
    else:
        print('No gates to draw: no run has a layer like UBN.')


def _save(figure: Figure, out: Path, stem: str) -> None:
    for suffix in ('png', 'svg'):
        path = out / f'{stem}.{suffix}'
        figure.savefig(path, dpi=160)
        print(path)


if __name__ == '__main__':
    main()

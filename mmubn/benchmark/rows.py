"""The measures as rows of a CSV, each with what it was measured on."""

import csv
import subprocess
from datetime import datetime
from pathlib import Path
from typing import Dict, List, Optional, Sequence

import torch

from ..cli.errors import CommandError
from ..paths import ROOT
from ..version import __version__

Row = Dict[str, str]

COLUMNS = (
    *('date', 'commit', 'device', 'torch', 'triton', 'mmubn'),
    *('model', 'norm', 'shape', 'dtype', 'layout', 'what'),
    *('median_ms', 'p10_ms', 'p90_ms', 'ratio_bn', 'ratio_literal'),
    *('saved_bytes', 'saved_ratio_bn', 'peak_bytes', 'launches', 'rounds'),
)
SETTING = ('model', 'shape', 'dtype', 'layout')
TOTALS = ('both', 'step')


def describe_run(device: torch.device) -> Row:
    """The columns that all rows of a run share. No host name is among them."""
    if device.type == 'cuda':
        name = f'cuda: {torch.cuda.get_device_name(device)}'
    else:
        name = f'cpu: {_cpu_name()}, {torch.get_num_threads()} threads'
    try:
        from triton import __version__ as triton  # its distributions have several names
    except ImportError:
        triton = ''
    return dict(
        date=datetime.now().isoformat(timespec='seconds'),
        commit=_commit(),
        device=name,
        torch=torch.__version__,
        triton=triton,
        mmubn=__version__,
    )


def _cpu_name() -> str:
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(':', 1)[1].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else 'unknown'


def _commit() -> str:
    """The short hash, ``-dirty`` where a tracked file differs; measurements do not count."""

    def git(*arguments: str) -> str:
        command = ['git', '-C', str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        top, commit = git('rev-parse', '--show-toplevel', '--short', 'HEAD').splitlines()
        changed = git('status', '--porcelain', '-uno', '--', '.', ':!tools/benchmarks')
    except (OSError, subprocess.CalledProcessError):
        return 'unknown'
    if Path(top).resolve() != ROOT:  # installed inside of another repository
        return 'unknown'
    return f'{commit}-dirty' if changed else commit


def make_rows(
    run: Row,
    setting: Row,
    laps: Dict[str, List[Dict[str, float]]],
    saved: Optional[Dict[str, int]] = None,
    peak: Optional[Dict[str, Optional[int]]] = None,
    launches: Optional[Dict[str, int]] = None,
) -> List[Row]:
    """Rows of one setting, a phase of a norm each, and the sum of its phases.

    Args:
        run (dict): Of :func:`describe_run`.
        setting (dict): model, shape, dtype and layout.
        laps (dict): Norm -> the milliseconds of each phase, for each round.
        saved (dict, optional): Norm -> bytes kept for the backward pass.
        peak (dict, optional): Norm -> peak bytes, None where unknown.
        launches (dict, optional): Norm -> of :func:`.measure.launches`.

    Returns:
        list[dict]: The rows.
    """
    times = {norm: _by_phase(rounds, bool(setting['model'])) for norm, rounds in laps.items()}
    rows = []
    for norm, phases in times.items():
        for what, values in phases.items():
            row = dict.fromkeys(COLUMNS, '')
            row.update(run, **setting, norm=norm, what=what, **columns_of(values))
            for other in ('bn', 'literal'):
                if other in times:
                    row[f'ratio_{other}'] = ratio_of(values, times[other][what])
            if what in TOTALS:
                row.update(_memory(norm, saved or {}, peak or {}))
                row['launches'] = str((launches or {}).get(norm, ''))
            rows.append(row)
    return rows


def _by_phase(rounds: List[Dict[str, float]], is_model: bool) -> Dict[str, List[float]]:
    phases = {phase: [lap[phase] for lap in rounds] for phase in rounds[0]}
    parts = [values for phase, values in phases.items() if phase != 'enqueue']
    if len(parts) > 1:
        phases['step' if is_model else 'both'] = [sum(lap) for lap in zip(*parts)]
    return phases


def _memory(norm: str, saved: Dict[str, int], peak: Dict[str, Optional[int]]) -> Row:
    memory = {}
    if norm in saved:
        memory['saved_bytes'] = str(saved[norm])
        if 'bn' in saved:
            memory['saved_ratio_bn'] = f'{saved[norm] / saved["bn"]:.4f}'
    if peak.get(norm) is not None:
        memory['peak_bytes'] = str(peak[norm])
    return memory


def columns_of(times: Sequence[float]) -> Row:
    """How many rounds there were, and their median and tenths in milliseconds."""
    quantiles = dict(median_ms=0.5, p10_ms=0.1, p90_ms=0.9)
    found = {column: f'{_quantile(times, share):.5g}' for column, share in quantiles.items()}
    return dict(found, rounds=str(len(times)))


def ratio_of(times: Sequence[float], others: Sequence[float]) -> str:
    """Median of the ratios of the rounds, as neighbours in time are disturbed alike."""
    return f'{_quantile([a / b for a, b in zip(times, others)], 0.5):.4f}'


def _quantile(values: Sequence[float], share: float) -> float:
    """A quantile of a sample, between its values by a straight line."""
    return torch.tensor(values, dtype=torch.float64).quantile(share).item()


def check_csv(path: Path, columns: Sequence[str]) -> None:
    """Makes sure that rows can be appended.

    Raises:
        CommandError: The file has other columns.
    """
    if path.exists():
        with path.open(newline='') as file:
            header = next(csv.reader(file), None)
        if header is not None and tuple(header) != tuple(columns):
            raise CommandError(
                f'{path}: its columns are not those of this version ({",".join(columns)}); '
                'rename it, or name another file by --csv'
            )


def append_csv(path: Path, rows: Sequence[Row], columns: Sequence[str]) -> None:
    """Appends rows, below a header where the file is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('a', newline='') as file:
        writer = csv.DictWriter(file, columns, lineterminator='\n')
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(rows)


def read_last_run(path: Path) -> List[Row]:
    """The rows of the last run.

    Raises:
        CommandError: There is no such file, or no row in it.
    """
    if not path.is_file():
        raise CommandError(f'{path}: no such file')
    check_csv(path, COLUMNS)
    with path.open(newline='') as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise CommandError(f'{path}: holds no rows yet')
    return [row for row in rows if row['date'] == rows[-1]['date']]

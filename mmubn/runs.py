"""Reads what a training leaves in its work directory.

Everything here reads a directory as a killed training leaves it: lines that are cut short
or hold zeros are passed over, and so is what a resumed training did a second time. The
directory may have been moved, renamed or copied.
"""

import csv
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple, Union

PathLike = Union[str, Path]

TABLE = 'condensation.csv'
COLUMNS = (
    'epoch',
    'iter',
    'layer',
    'type',
    'where',
    'similarity',
    'running_similarity',
    'batch_statistics_used',
)
PLACES = ('fixed/input', 'fixed/output', 'train/input', 'train/output')
_INTEGERS, _NUMBERS = COLUMNS[:2], COLUMNS[5:]
_CONDENSATION = 'condensation/'  # what CondensationHook's scalars begin with
_STAMP = re.compile(r'\d{8}_\d{6}')  # mmengine's name of a run's log folder


# --- Scalars.


@dataclass
class Scalars:
    """The scalars that mmengine logged.

    Attributes:
        train (list[dict]): The lines of training, by ``step``, which counts iterations.
        metrics (dict): Of validation: name -> step -> value. ``step`` counts epochs. In an
            iteration-based loop it counts iterations; where mmengine logged 0 in their place
            (``LoggerHook(log_metric_by_epoch=True)``), it is the last iteration that was
            logged before; of several validations after the same one, the last is kept.
        validations (dict): ``step``, counted as that of ``metrics`` -> the last iteration that
            was logged before. COCO's metric gives no value where nothing was detected.
    """

    train: List[Dict[str, Any]] = field(default_factory=list)
    metrics: Dict[str, Dict[int, float]] = field(default_factory=dict)
    validations: Dict[int, int] = field(default_factory=dict)


def read_scalars(work_dir: PathLike) -> Scalars:
    """Reads every ``<time stamp>/vis_data/scalars.json`` of a work directory.

    What a resumed training repeats replaces what was there from that step on. A training
    that started anew in the same directory replaces all that was there, unless it was broken
    off before its first checkpoint and an earlier one was resumed after it.

    Args:
        work_dir (str or Path): The work directory.
    """
    begun: List[_Training] = []
    logs = Path(work_dir).glob('*/vis_data/scalars.json')
    for log in sorted(log for log in logs if _STAMP.fullmatch(log.parts[-3])):
        lines = list(_json_lines(log))
        steps = [line['step'] for line in lines if 'lr' in line]
        config = _config(log)
        if lines and (not begun or _started_anew(config)):
            begun.append(_Training(_counts_epochs(config)))
        elif steps:
            # The newest that came to where this one goes on; its checkpoint was overwritten.
            begun.sort(key=lambda training: training.reaches(steps))
        for line in lines:
            begun[-1].add(line)
    return begun[-1].scalars if begun else Scalars()


class _Training:
    """One training from its start, through all its resumptions.

    Args:
        counts_epochs (bool): Whether its loop is known to be epoch-based.
    """

    def __init__(self, counts_epochs: bool) -> None:
        self.scalars = Scalars()
        self._counts_epochs = counts_epochs
        self._iteration = 0  # of the last line that counts iterations, of condensation too
        self._seen: Dict[str, Dict[int, int]] = {}  # name -> step -> the last iteration before

    @property
    def last(self) -> int:
        """The last iteration that was logged; 0 before the first."""
        return self.scalars.train[-1]['step'] if self.scalars.train else 0

    def add(self, line: Dict[str, Any]) -> None:
        """Takes a line of the log."""
        step = line['step']
        if 'lr' in line:
            if step <= self.last:
                self._go_back(step)
            self.scalars.train.append(line)
        if 'lr' in line or any(name.startswith(_CONDENSATION) for name in line):
            self._iteration = step
            return
        step = self._metric_step(step)
        if 'time' in line:  # of mmengine's own lines
            _put(self.scalars.validations, step, self.last)
        for name, value in line.items():
            if _is_metric(name, value):
                _put(self.scalars.metrics.setdefault(name, {}), step, value)
                self._seen.setdefault(name, {})[step] = self.last

    def reaches(self, steps: List[int]) -> bool:
        """Whether these steps follow its own, or repeat them, without a gap."""
        own = [0, *(line['step'] for line in self.scalars.train)]
        gaps = [b - a for part in (own, steps) for a, b in zip(part, part[1:])]
        return self.last + max(gaps, default=0) >= steps[0]

    def _metric_step(self, step: int) -> int:
        """The step of a validation: epochs where the training counts them, else iterations."""
        if step == 0:  # of an iteration-based loop, or before all training
            return self._iteration
        epoch = self.scalars.train[-1].get('epoch') if self.scalars.train else None
        if self._counts_epochs and epoch is not None and epoch < step >= self.last:
            return epoch  # LoggerHook(log_metric_by_epoch=False) writes iterations
        return step

    def _go_back(self, step: int) -> None:
        """Drops what was logged from an iteration on."""
        self.scalars.train = [line for line in self.scalars.train if line['step'] < step]
        for name, curve in self.scalars.metrics.items():
            for epoch in [epoch for epoch in curve if self._seen[name][epoch] >= step]:
                del curve[epoch]
        validations = self.scalars.validations
        self.scalars.validations = {k: last for k, last in validations.items() if last < step}


def _put(curve: Dict[int, Any], step: int, value: Any) -> None:
    """Sets the value of a step, and drops those of later ones, which are of another start."""
    for later in [other for other in curve if other >= step]:
        del curve[later]
    curve[step] = value


def _json_lines(path: Path) -> Iterator[Dict[str, Any]]:
    for text in path.read_text(errors='replace').splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get('step'), int):
            yield line


def _config(log: Path) -> str:
    """The text of the config that mmengine keeps beside the log; empty where there is none."""
    config = log.with_name('config.py')
    return config.read_text(errors='replace') if config.is_file() else ''


def _started_anew(config: str) -> bool:
    """Whether there is a config, which does not ask to resume."""
    return bool(config.strip()) and not re.search(r'^resume = True$', config, re.MULTILINE)


def _counts_epochs(config: str) -> bool:
    """Whether ``train_cfg``, which may go on in indented lines, has a number of epochs."""
    return bool(re.search(r'^train_cfg = (.|\n )*?\bmax_epochs=', config, re.MULTILINE))


def _is_metric(name: str, value: Any) -> bool:
    other = (_CONDENSATION, 'time', 'data_time', 'step', 'memory')
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and not name.startswith(other)


# --- Condensation.


def table_of(path: PathLike) -> Path:
    """The condensation table of a work dir; a table itself stays what it is."""
    path = Path(path)
    return path / TABLE if path.is_dir() else path


def read_condensation(path: PathLike) -> List[Dict[str, Any]]:
    """Reads the table that ``CondensationHook`` wrote.

    Args:
        path (str or Path): A work directory, or the table itself.

    Returns:
        list[dict]: Its whole rows with the keys :data:`COLUMNS`: ``epoch`` and ``iter`` are
        ints, the three last are floats or None. A column that an older version did not
        write is None.

    Raises:
        FileNotFoundError: There is none.
        ValueError: The file is no such table.
    """
    path = table_of(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; train with custom_hooks=[dict(type='CondensationHook')]"
        )
    # Each line ends with a line end once it is whole.
    *lines, _ = path.read_bytes().decode('utf-8-sig', errors='replace').split('\n')
    if not lines:
        return []
    header = lines[0].rstrip('\r').split(',')
    if not {*COLUMNS[:3], 'where', 'similarity'} <= set(header):
        raise ValueError(f'{path} is no condensation table: its first line is {lines[0][:80]!r}')
    rows = (_row(header, line.rstrip('\r')) for line in lines[1:])
    return [row for row in rows if row is not None]


def as_written(row: Dict[str, Any]) -> Dict[str, Any]:
    """A row of :func:`read_condensation` as it stands in a table: floats with six digits."""
    return {k: f'{v:.6g}' if isinstance(v, float) else v for k, v in row.items()}


def _row(header: List[str], line: str) -> Optional[Dict[str, Any]]:
    """A typed row; None of a line that is not whole."""
    if '\0' in line:  # what a file system leaves of a page that it did not write
        return None
    cells = next(csv.reader([line]), [])
    if len(cells) != len(header):
        return None
    found = dict(zip(header, cells))
    row: Dict[str, Any] = {name: found.get(name) for name in COLUMNS}
    if row['where'] not in PLACES or not row['layer']:
        return None
    try:
        row.update({name: int(row[name]) for name in _INTEGERS})
        row.update({name: float(row[name]) if row[name] else None for name in _NUMBERS})
    except ValueError:
        return None
    return row


# --- Checkpoints.


def noted_checkpoint(work_dir: PathLike) -> str:
    """What ``last_checkpoint`` names, as mmengine wrote it; empty where there is none."""
    note = Path(work_dir) / 'last_checkpoint'
    return note.read_text(errors='replace').replace('\0', '').strip() if note.is_file() else ''


def last_checkpoint(work_dir: PathLike) -> Optional[Path]:
    """The file that ``last_checkpoint`` names; None where it is missing or cut short.

    mmengine writes the path as it was then. So the file of that name in the work directory
    itself comes first: it is the one also after a move or a copy. The path as it is written
    counts where it leads elsewhere (``CheckpointHook(out_dir=...)``), but not into the work
    directory of another training.

    Args:
        work_dir (str or Path): The work directory.
    """
    text = noted_checkpoint(work_dir)
    name = re.split(r'[\\/]', text)[-1]
    beside, named = Path(work_dir) / name, Path(text)
    if not name or not (name.endswith('.pth') or beside.is_file() or named.is_file()):
        return None
    foreign = named.parent.resolve() != Path(work_dir).resolve() and (
        (named.parent / 'last_checkpoint').exists()
    )
    if beside.is_file() or foreign or not named.is_file():
        return beside
    return named


def checkpoints(work_dir: PathLike) -> List[Path]:
    """The checkpoints to go on from, the best choice first; not all need be whole.

    First comes :func:`last_checkpoint`, also where that file is missing; then those before
    it by the number in their name; then the others, the newest first. ``best_*.pth`` are
    left out, and so is what is no file, such as a link to a folder that was moved.

    Args:
        work_dir (str or Path): The work directory.
    """
    last = last_checkpoint(work_dir)
    folder = Path(work_dir) if last is None else last.parent
    found = (path for path in folder.glob('*.pth') if not path.name.startswith('best_'))
    files = [path for path in found if path.is_file()]
    stem, number = _numbered(last) if last is not None else (None, 0)

    def order(path: Path) -> Tuple[bool, int, float, int]:
        its_stem, its_number = _numbered(path)
        same = its_stem == stem
        return same, its_number * same, path.stat().st_mtime, its_number

    files.sort(key=order, reverse=True)
    if last is None:
        return files
    return [last, *(p for p in files if _numbered(p)[0] != stem or _numbered(p)[1] < number)]


def _numbered(path: Path) -> Tuple[str, int]:
    """``('epoch_', 12)`` of ``epoch_12.pth``."""
    match = re.fullmatch(r'(.*?)(\d+)', path.stem)
    return (match[1], int(match[2])) if match else (path.stem, 0)

"""What a work dir tells of its run: the settings, and the metrics by epoch and time."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from ..cli.errors import CommandError
from ..runs import read_condensation, read_scalars

SETTINGS = 'run.json'
EPOCH_LOSS = 'epoch_loss'  # in a line of the log: the mean since the start of the epoch
# The paper's names of metrics, mmengine's, and what the latter are multiplied by.
METRICS = {
    'top1': ('accuracy/top1', 1),
    'top5': ('accuracy/top5', 1),
    **{
        f'{kind}_AP{size}': (f'coco/{kind}_mAP_{size}'.rstrip('_'), 100)
        for kind in ('bbox', 'segm')
        for size in ('', '50', '75', 's', 'm', 'l')
    },
}


@dataclass
class Run:
    """One training, finished or not.

    Attributes:
        folder (Path): The work dir.
        settings (dict): As ``reproduce.py run`` wrote them; empty if it never began.
        curves (dict): Metric -> epoch -> value, in per cent; and ``loss``, the mean of an
            epoch's iterations.
        seconds (dict): Epoch -> seconds of training until its end, without validation.
        epoch (int): The last one with a validation.
    """

    folder: Path
    settings: Dict[str, Any]
    curves: Dict[str, Dict[int, float]]
    seconds: Dict[int, float]
    epoch: int

    @property
    def state(self) -> str:
        """``done``, ``part`` or ``not run``."""
        if not self.settings:
            return 'not run'
        return 'done' if self.epoch >= self.settings['epochs'] else 'part'

    def final(self, metric: str) -> Optional[float]:
        """The value after the last epoch, which is not the best one; None where it has none."""
        return self.curves.get(metric, {}).get(self.settings['epochs'])

    @cached_property
    def last_condensation(self) -> List[Dict[str, Any]]:
        """The rows of its condensation table after the last epoch; none where it has none.

        Raises:
            CommandError: The file is no condensation table.
        """
        try:
            rows = read_condensation(self.folder)
        except FileNotFoundError:
            return []
        except ValueError as error:
            raise CommandError(f'{error}; move it away for a report without it') from error
        return [row for row in rows if row['epoch'] == self.settings['epochs']]

    def epoch_reaching(self, metric: str, value: float) -> int:
        """The first epoch with at least this value; 0 for none."""
        return next((e for e, v in sorted(self.curves[metric].items()) if v >= value), 0)


def read_run(folder: Path) -> Run:
    """Reads ``run.json`` and the scalars of a work dir.

    COCO's -1 says that there are no objects of a size, so it is no value.

    Raises:
        CommandError: ``run.json`` is cut short.
    """
    scalars = read_scalars(folder)
    curves: Dict[str, Dict[int, float]] = {}
    validated = [*scalars.validations]
    for metric, (key, factor) in METRICS.items():
        found = scalars.metrics.get(key, {})
        validated += found
        is_coco = key.startswith('coco/')
        curve = {step: v * factor for step, v in found.items() if not (is_coco and v == -1)}
        if curve:
            curves[metric] = curve
    seconds: Dict[int, float] = {}
    losses: Dict[int, List[Tuple[int, float]]] = {}  # epoch -> (iterations, their mean)
    whole: Dict[int, float] = {}
    total, last = 0.0, 0
    for line in scalars.train:
        step = line['step']
        total += (step - last) * line['time']
        seconds[line['epoch']] = total
        losses.setdefault(line['epoch'], []).append((step - last, line['loss']))
        if EPOCH_LOSS in line:  # an older version did not write it
            whole[line['epoch']] = line[EPOCH_LOSS]
        last = step
    if losses:
        means = {
            number: sum(n * loss for n, loss in parts) / sum(n for n, _ in parts)
            for number, parts in losses.items()
        }
        curves['loss'] = {**means, **whole}
    return Run(folder, _read_settings(folder), curves, seconds, max(validated, default=0))


def _read_settings(folder: Path) -> Dict[str, Any]:
    path = folder / SETTINGS
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise CommandError(
            f'{path}: is cut short, so nothing says what was trained there; remove {folder}'
        ) from error

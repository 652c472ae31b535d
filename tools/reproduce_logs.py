"""What a work dir tells of its run: the settings, and the metrics by epoch and time."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Tuple

SETTINGS = 'run.json'
# The paper's names of metrics, mmengine's, and what the latter are multiplied by.
METRICS = {
    'top1': ('accuracy/top1', 1),
    'top5': ('accuracy/top5', 1),
    **{
        f'{kind}_AP{paper}': (f'coco/{kind}_mAP{ours}', 100)
        for kind in ('bbox', 'segm')
        for paper, ours in (
            *(('', ''), ('50', '_50'), ('75', '_75')),
            *(('s', '_s'), ('m', '_m'), ('l', '_l')),
        )
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
    """

    folder: Path
    settings: Dict[str, Any]
    curves: Dict[str, Dict[int, float]]
    seconds: Dict[int, float]

    @property
    def epoch(self) -> int:
        """The last one with a validation."""
        validated = (max(c) for metric, c in self.curves.items() if metric != 'loss')
        return max(validated, default=0)

    @property
    def state(self) -> str:
        """``done``, ``part`` or ``not run``."""
        if not self.settings:
            return 'not run'
        return 'done' if self.epoch >= self.settings['epochs'] else 'part'

    def final(self, metric: str) -> float:
        """The value after the last epoch, which is not the best one."""
        return self.curves[metric][self.settings['epochs']]

    def epoch_reaching(self, metric: str, value: float) -> int:
        """The first epoch with at least this value; 0 for none."""
        return next((e for e, v in sorted(self.curves[metric].items()) if v >= value), 0)


def read_run(folder: Path) -> Run:
    """Reads ``run.json`` and all ``scalars.json`` of a work dir.

    What a resumed training repeats replaces what it did before.
    """
    path = folder / SETTINGS
    settings = json.loads(path.read_text()) if path.is_file() else {}
    train: Dict[int, dict] = {}
    curves: Dict[str, Dict[int, float]] = {}
    for log in sorted(folder.glob('*/vis_data/scalars.json')):  # by time stamp
        for text in log.read_text().splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:  # cut short where the training was killed
                continue
            if 'lr' in line:
                train[line['step']] = line
            for metric, (key, factor) in METRICS.items():
                if key in line:
                    curves.setdefault(metric, {})[line['step']] = line[key] * factor
    seconds: Dict[int, float] = {}
    losses: Dict[int, List[Tuple[int, float]]] = {}  # epoch -> (iterations, their mean)
    total, last = 0.0, 0
    for step, line in sorted(train.items()):
        total += (step - last) * line['time']
        seconds[line['epoch']] = total
        losses.setdefault(line['epoch'], []).append((step - last, line['loss']))
        last = step
    for epoch, parts in losses.items():
        mean = sum(n * loss for n, loss in parts) / sum(n for n, _ in parts)
        curves.setdefault('loss', {})[epoch] = mean
    return Run(folder, settings, curves, seconds)

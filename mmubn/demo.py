"""The lines that sum up a run of `make demo`."""

from datetime import datetime
from pathlib import Path
from typing import Any, Dict, List

import torch

from .runs import last_checkpoint

_TIME = '%Y%m%d_%H%M%S'


def training_time(work_dir: Path) -> str:
    """From the start of the training to its last checkpoint, validation included.

    Raises:
        FileNotFoundError: There is no checkpoint.
    """
    checkpoint = last_checkpoint(work_dir)
    if checkpoint is None or not checkpoint.is_file():
        raise FileNotFoundError(f'no checkpoint in {work_dir}')
    meta = torch.load(checkpoint, map_location='cpu', weights_only=False)['meta']
    start = datetime.strptime(meta['experiment_name'][-15:], _TIME)
    end = datetime.strptime(meta['time'], _TIME)
    minutes = (end - start).total_seconds() / 60
    return f'{meta["iter"]} iterations in {minutes:.1f} minutes, seed {meta["seed"]}'


def held_out_ap(metrics: Dict[str, float]) -> str:
    """One line each for boxes and masks."""
    lines = ['Held-out images     AP    AP50    AP75']
    for title, name in (('boxes', 'bbox'), ('masks', 'segm')):
        values = [metrics[f'coco/{name}_mAP{suffix}'] for suffix in ('', '_50', '_75')]
        lines.append(f'{title:14}' + ''.join(f'{value:8.3f}' for value in values))
    return '\n'.join(lines)


def condensation(rows: List[Dict[str, Any]]) -> str:
    """One line a layer, as they are after the last epoch.

    Raises:
        ValueError: There is no row.
    """
    if not rows:
        raise ValueError('condensation.csv holds no record')
    last = [row for row in rows if row['iter'] == rows[-1]['iter']]
    layers: Dict[str, Dict[str, Dict[str, Any]]] = {}
    for row in last:
        layers.setdefault(row['layer'], {})[row['where']] = row
    lines = [
        'Condensation (mean cosine similarity of features) of held-out images after training;',
        'tau and gate: running similarity and share of steps with batch statistics in training',
        f'{"layer":36}{"type":6}{"input":>8}{"output":>8}{"tau":>8}{"gate":>8}',
    ]
    for name, by_place in layers.items():
        first = next(iter(by_place.values()))
        train = by_place.get('train/input', {})  # rows may lack where a training was killed
        values = (
            by_place.get('fixed/input', {}).get('similarity'),
            by_place.get('fixed/output', {}).get('similarity'),
            train.get('running_similarity'),
            train.get('batch_statistics_used'),
        )
        shown = ''.join(f'{"-":>8}' if v is None else f'{v:8.2f}' for v in values)
        lines.append(f'{name:36}{first["type"]:6}{shown}')
    return '\n'.join(lines)

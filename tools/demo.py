"""Sums up a run of `make demo`: held-out AP, training time, condensation of each norm layer."""

import argparse
import json
from datetime import datetime
from pathlib import Path
from typing import Any, Dict, List

import torch

from mmubn.runs import last_checkpoint, read_condensation

_TIME = '%Y%m%d_%H%M%S'


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('work_dir', type=Path, help='--work-dir of the training')
    return parser.parse_args()


def main() -> None:
    work_dir = parse_args().work_dir
    tests = sorted((work_dir / 'test').glob('*/*.json'))
    if not tests:
        raise SystemExit(f'demo.py: no evaluation in {work_dir / "test"}: run `make demo` first')
    print(f'\nDemo in {work_dir}: {training_time(work_dir)}')
    try:
        print(held_out_ap(json.loads(tests[-1].read_text())))
        print(condensation(read_condensation(work_dir)))
    except (OSError, ValueError) as error:
        raise SystemExit(f'demo.py: {work_dir}: {error}: run `make demo` again') from error
    print(f'Drawn on held-out images (left truth, right prediction): {work_dir / "predictions"}')


def training_time(work_dir: Path) -> str:
    """From the start of the training to its last checkpoint, validation included."""
    checkpoint = last_checkpoint(work_dir)
    if checkpoint is None or not checkpoint.is_file():
        raise SystemExit(f'demo.py: no checkpoint in {work_dir}: run `make demo` first')
    meta = torch.load(checkpoint, map_location='cpu', weights_only=False)['meta']
    start = datetime.strptime(meta['experiment_name'][-15:], _TIME)
    end = datetime.strptime(meta['time'], _TIME)
    minutes = (end - start).total_seconds() / 60
    return f'{meta["iter"]} iterations in {minutes:.1f} minutes, seed {meta["seed"]}'


def held_out_ap(metrics: Dict[str, float]) -> str:
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


if __name__ == '__main__':
    main()

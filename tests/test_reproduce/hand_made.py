"""Work dirs with the logs of trainings that never were."""

import json
from pathlib import Path

from mmubn.reproduce.logs import SETTINGS

# A config, as far as the jobs ask for it.
NET = """train_cfg = dict(max_epochs=3)
model = dict(backbone=dict())
val_evaluator = dict(type='Accuracy')
"""


def write_run(folder: Path, epochs: int, parts, seed=0):
    """``parts``: for each start of the training a list of (epoch, iteration time, top1)."""
    folder.mkdir(parents=True)
    record = dict(config='net', options=[], epochs=epochs, seed=seed, data='d', gpus=0)
    record.update(device='cpu: none', torch='2', commit='abc')
    (folder / SETTINGS).write_text(json.dumps(record))
    for number, part in enumerate(parts):
        logs = folder / f'2026010{number}_000000' / 'vis_data'
        logs.mkdir(parents=True)
        lines = []
        for epoch, seconds, top1 in part:
            for step in (10, 15):  # 15 iterations an epoch, a line every 10
                iteration = 15 * (epoch - 1) + step
                line = dict(lr=0.1, time=seconds, epoch=epoch, iter=iteration, step=iteration)
                lines.append({**line, 'loss': 6 / epoch + (step == 15)})
            lines.append({'condensation/all/train/input': 0.5, 'step': 15 * epoch})
            lines.append({'accuracy/top1': top1, 'time': 99.0, 'step': epoch})
        (logs / 'scalars.json').write_text('\n'.join(map(json.dumps, lines)) + '\n{"cut')


def small(norm: str, seed: int) -> Path:
    return Path('runs') / f'net-{norm}' / f'seed{seed}'


def write_logs():
    """BN and UBN, three seeds each; the values are all there is to the report."""
    Path('net.py').write_text(NET)
    bn = [(30.0, 41.0, 40.0), (30.0, 41.0, 42.0), (30.0, 43.0, 44.0)]
    ubn = [(40.0, 39.0, 41.0), (20.0, 42.0, 45.0), (43.0, 44.0, 48.0)]
    for seed in range(3):
        for norm, curves, seconds in (('BN', bn, 0.1), ('UBN', ubn, 0.2)):
            part = [(e + 1, seconds, v) for e, v in enumerate(curves[seed])]
            write_run(small(norm, seed), 3, [part], seed)

"""What fct_interval and fct_stride do to UBN's running similarity, on a real training.

Trains a config as it is for some iterations and takes, at every UBN layer and in every
step, the similarity of all positions and of every few rows and columns. From these it
follows the running similarity that each setting would have had, beside that of measuring
everything in every step.
"""

import argparse
import csv
from collections import defaultdict
from itertools import product
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from mmubn.cli.errors import CommandError, command
from mmubn.cli.options import build_runner, load_config, make_parser
from mmubn.cli.work_dir_check import check_output
from mmubn.layers import UBN
from mmubn.ops import mean_cosine_similarity

COLUMNS = ('fct_interval', 'fct_stride', 'mean_difference', 'largest_difference', 'gates_differing')


def parse_args(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument('--iterations', type=int, default=300, help='of training (default: 300)')
    parser.add_argument('--intervals', type=int, nargs='+', default=[1, 4, 16])
    parser.add_argument('--strides', type=int, nargs='+', default=[1, 2, 4])
    parser.add_argument('--csv', type=Path, help='file for the table')
    return parser.parse_args(argv)


def record(
    model: nn.Module, strides: List[int]
) -> Tuple[Dict[str, UBN], Dict[str, Dict[int, List[Tensor]]]]:
    """Lets every training step leave the similarities of each UBN layer, per stride."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, UBN)}
    if not layers:
        raise CommandError("config: no UBN layer to measure; set norm_cfg=dict(type='UBN')")
    seen = {name: defaultdict(list) for name in layers}

    def hook_of(name: str):
        @torch.no_grad()
        def hook(module: UBN, args: Tuple[Tensor, ...]) -> None:
            if module.training:
                for stride in strides:
                    positions = args[0][:, :, ::stride, ::stride]
                    seen[name][stride].append(mean_cosine_similarity(positions))

        return hook

    for name, module in layers.items():
        module.register_forward_pre_hook(hook_of(name))
    return layers, seen


def follow(similarities: Tensor, momentum: float, interval: int) -> Tensor:
    """The running similarity after every step, from 1, as the layer moves it."""
    tau, taus = torch.ones(()), []
    for step, similarity in enumerate(similarities):
        if step % interval == 0 and similarity.isfinite():
            tau = tau.lerp(similarity, 1 - (1 - momentum) ** interval)
        taus.append(tau)
    return torch.stack(taus)


def compare(
    layers: Dict[str, UBN],
    seen: Dict[str, Dict[int, List[Tensor]]],
    intervals: List[int],
    strides: List[int],
) -> List[Tuple]:
    """A row for each setting: its differences over all layers and steps."""
    rows = []
    for interval, stride in product(intervals, strides):
        differences, gates = [], []
        for name, layer in layers.items():
            every = follow(torch.stack(seen[name][1]).cpu(), layer.fct_momentum, 1)
            some = follow(torch.stack(seen[name][stride]).cpu(), layer.fct_momentum, interval)
            differences.append((some - every).abs())
            gates.append((some > layer.fct) != (every > layer.fct))
        difference, gate = torch.cat(differences), torch.cat(gates).float()
        rows.append(
            (interval, stride, *map(float, (difference.mean(), difference.max(), gate.mean())))
        )
    return rows


@command
def main(argv: Optional[Sequence[str]] = None) -> None:
    """Trains and prints the table."""
    args = parse_args(argv)
    if args.csv:
        check_output('--csv', str(args.csv))
    cfg = load_config(args)
    cfg.train_cfg = dict(by_epoch=False, max_iters=args.iterations)
    cfg.log_processor = dict(by_epoch=False)
    cfg.param_scheduler = None
    for key in ('val_cfg', 'val_dataloader', 'val_evaluator'):
        cfg[key] = None
    runner = build_runner(cfg)
    strides = sorted({1, *args.strides})
    layers, seen = record(runner.model, strides)
    runner.train()
    rows = compare(layers, seen, args.intervals, args.strides)
    print(f'\n{len(layers)} UBN layers, {args.iterations} steps of {args.config}')
    print(f'{"interval":>8} {"stride":>6} {"mean |dtau|":>11} {"largest":>8} {"gate differs":>12}')
    for interval, stride, mean, largest, gate in rows:
        print(f'{interval:>8} {stride:>6} {mean:>11.4f} {largest:>8.4f} {gate:>12.2%}')
    if args.csv:
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        with args.csv.open('w', newline='') as file:
            csv.writer(file).writerows([COLUMNS, *rows])


if __name__ == '__main__':
    main()

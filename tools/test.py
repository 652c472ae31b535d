"""Tests a checkpoint of a model of mmdet or mmpretrain."""

import argparse
import inspect
import os.path as osp
from typing import Optional, Sequence

import mmengine
from mmengine.config import Config
from mmengine.registry import HOOKS, METRICS

import mmubn  # noqa: F401  registers UBN for configs without custom_imports
from mmubn.cli.errors import CommandError, command
from mmubn.cli.lookup import find_class
from mmubn.cli.options import build_runner, load_config, make_parser
from mmubn.cli.preflight import preflight
from mmubn.cli.processes import on_main_process, start_processes
from mmubn.writing import check_file, check_folder

_FORMATS = ('.json', '.yaml', '.yml', '.pkl', '.pickle')  # that mmengine.dump knows


def parse_args(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    parser.add_argument('checkpoint', help='.pth file, or URL')
    parser.add_argument('--out', metavar='FILE.pkl', help='file for the predictions')
    parser.add_argument(
        '--out-item',
        choices=['metrics', 'pred'],
        default='pred',
        help='what --out holds; metrics may go into a .json',
    )
    parser.add_argument('--show', action='store_true', help='draw predictions in a window')
    parser.add_argument('--show-dir', help='draw predictions into this folder')
    parser.add_argument(
        '--wait-time', type=float, default=2, help='seconds that a window of --show stays (2)'
    )
    return parser.parse_args(argv)


def merge_args(cfg: Config, args: argparse.Namespace) -> None:
    """Lays the options of testing over the config."""
    cfg.load_from = args.checkpoint
    if args.out and args.out_item == 'pred' and not args.out.endswith(('.pkl', '.pickle')):
        raise CommandError(f'--out {args.out}: predictions go into a .pkl file')
    if args.out and not args.out.endswith(_FORMATS):
        raise CommandError(f'--out {args.out}: metrics go into a file of {", ".join(_FORMATS)}')
    if args.out:
        check_file('--out', args.out)
    if args.show_dir:
        check_folder('--show-dir', args.show_dir)
    if not (args.show or args.show_dir):
        return
    hook = (cfg.get('default_hooks') or {}).get('visualization')
    if hook is None:
        raise CommandError('--show: the config has no default_hooks.visualization')
    # mmdet joins a relative folder to its run folder, once more at every batch.
    folder = osp.abspath(args.show_dir) if args.show_dir else None
    if 'enable' in inspect.signature(find_class(hook, HOOKS)).parameters:  # mmpretrain's
        settings = dict(enable=True, interval=1, out_dir=folder)
    else:
        settings = dict(draw=True, test_out_dir=folder)
    hook.update(settings, show=args.show, wait_time=args.wait_time)


@command
def main(argv: Optional[Sequence[str]] = None) -> None:
    """Tests."""
    args = parse_args(argv)
    cfg = load_config(args, 'test')
    merge_args(cfg, args)
    start_processes(cfg)
    if not args.skip_checks:
        on_main_process(lambda: preflight(cfg, 'test'))
    runner = build_runner(cfg)
    if args.out and args.out_item == 'pred':
        metrics = runner.test_evaluator.metrics
        scopes = [cfg.get('default_scope'), *(type(m).__module__.split('.')[0] for m in metrics)]
        # mmdet's own compresses the masks.
        dump = 'mmdet.DumpDetResults' if 'mmdet' in scopes else 'mmengine.DumpResults'
        metrics.append(METRICS.build(dict(type=dump, out_file_path=args.out)))
    metrics = runner.test()
    if args.out and args.out_item == 'metrics':
        mmengine.dump(metrics, args.out)


if __name__ == '__main__':
    main()

"""Trains a model of mmdet or mmpretrain."""

import argparse
from contextlib import ExitStack
from typing import Optional, Sequence

from mmengine.config import Config

import mmubn  # noqa: F401  registers UBN for configs without custom_imports
from mmubn.cli.errors import command
from mmubn.cli.options import build_runner, load_config, make_parser
from mmubn.cli.preflight import preflight
from mmubn.cli.processes import on_main_process, start_processes
from mmubn.cli.resume import resume_settings
from mmubn.cli.sync_bn import replace_sync_bn
from mmubn.cli.work_dir_lock import locked


def parse_args(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='continue from this checkpoint, by default the last of the work directory',
    )
    parser.add_argument('--amp', action='store_true', help='train in mixed precision')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate by the batch size over that of the config',
    )
    return parser.parse_args(argv)


def merge_args(cfg: Config, args: argparse.Namespace) -> None:
    """Lays the options of training over the config."""
    if args.amp:
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if args.auto_scale_lr:
        cfg.merge_from_dict({'auto_scale_lr.enable': True})
    if args.resume is not None:
        cfg.resume = True
        if args.resume != 'auto':
            cfg.load_from = args.resume
    replace_sync_bn(cfg)


@command
def main(argv: Optional[Sequence[str]] = None) -> None:
    """Trains."""
    args = parse_args(argv)
    cfg = load_config(args, 'train')
    merge_args(cfg, args)
    start_processes(cfg)
    if cfg.get('resume'):
        newest = args.resume == 'auto'
        cfg.merge_from_dict(on_main_process(lambda: resume_settings(cfg, newest)))
    if not args.skip_checks:
        on_main_process(lambda: preflight(cfg, 'train'))
    with ExitStack() as held:
        on_main_process(lambda: held.enter_context(locked(cfg.work_dir)))
        build_runner(cfg).train()


if __name__ == '__main__':
    main()

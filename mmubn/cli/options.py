"""The options that the tools share, and the config they make."""

import argparse
import os
import os.path as osp
from pathlib import Path
from typing import Optional, Union

from mmengine.config import Config
from mmengine.registry import RUNNERS, init_default_scope
from mmengine.runner import Runner

from .cfg_options import OptionAction, merge_options
from .config_check import check_config
from .data_root import evaluate_on_train, set_data_root
from .errors import CommandError, one_line


def make_parser(description: str, starts_runner: bool = True) -> argparse.ArgumentParser:
    """A parser with the options that mmdet's and mmpretrain's tools share, and the data's.

    Args:
        description (str): What the tool does.
        starts_runner (bool): Whether it trains or tests; else there are only the options of a
            model and its data. Default: True.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('config', help='config file, of mmdet or of mmpretrain')
    if starts_runner:
        _add_runner_options(parser)
    else:
        parser.set_defaults(work_dir=None, eval_on_train=False, launcher='none', local_rank=0)
    parser.add_argument(
        '--data-root',
        metavar='DIR',
        help='folder of the data, in the layout the config expects; for COCO that is '
        'annotations/instances_{train,val}2017.json, train2017/ and val2017/, for CIFAR the '
        'unpacked archive, or train/ and test/ with a folder for each class',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=OptionAction,
        metavar='KEY=VALUE',
        help='settings that replace those of the config, by their dotted keys',
    )
    return parser


def _add_runner_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--work-dir', help='folder of logs and checkpoints (default: work_dirs/<config name>)'
    )
    parser.add_argument(
        '--eval-on-train',
        action='store_true',
        help='evaluate on the training images, where there is no validation split',
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='what started the processes (default: none)',
    )
    parser.add_argument(
        '--skip-checks',
        action='store_true',
        help='start at once, without looking for mistakes in config, data and checkpoints',
    )
    # Some launchers pass it in place of the environment variable.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


def load_config(args: argparse.Namespace, work: Optional[str] = None) -> Config:
    """Reads the config, lays the shared options over it and looks for mistakes in it.

    Args:
        args (Namespace): Of a parser by :func:`make_parser`.
        work (str): What it is for, as :func:`~mmubn.cli.config_check.check_config` takes it.

    Raises:
        CommandError: The file cannot be read, has mistakes, or its data cannot be replaced.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = read_config(args.config)
    cfg.launcher = args.launcher
    _set_scope(cfg)
    if args.cfg_options is not None:
        merge_options(cfg, args.cfg_options)
        _set_scope(cfg)
    if not getattr(args, 'skip_checks', False):  # scripts of users make their own Namespace
        check_config(cfg, work)
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = osp.join('work_dirs', osp.splitext(osp.basename(args.config))[0])
    if args.data_root is not None:
        set_data_root(cfg, args.data_root)
    if args.eval_on_train:
        evaluate_on_train(cfg)
    if cfg.get('default_scope') == 'mmpretrain':
        _complete_dataloaders(cfg)
    return cfg


def _set_scope(cfg: Config) -> None:
    scope = cfg.get('default_scope', 'mmengine')
    if scope is not None:  # which pure Python configs of mmdet have: they name classes
        init_default_scope(scope)


def read_config(file: Union[str, Path]) -> Config:
    """The config of a file, as it stands there.

    Args:
        file (str or Path): Its path.

    Raises:
        CommandError: There is no such file, or it cannot be read.
    """
    if not osp.isfile(file):
        raise CommandError(f'config: no file {file}; the project has its own in configs/')
    try:
        return Config.fromfile(file)
    except SyntaxError as error:
        raise CommandError(f'config {file}: line {error.lineno}: {error.msg}') from error
    except RecursionError as error:
        raise CommandError(f'config {file}: it is its own _base_, or a base of it is') from error
    except Exception as error:  # a config is Python, which may raise anything
        # Of custom_imports mmengine gives a page of paths; the cause names the module.
        cause = (isinstance(error, ImportError) and error.__cause__) or error
        reason = one_line(cause) or 'no reason is given'
        raise CommandError(f'config {file}: {type(error).__name__}: {reason}') from error


def _complete_dataloaders(cfg: Config) -> None:
    """Sets what mmpretrain's own tools add to its configs, which rely on it."""
    for key in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        loader = cfg.get(key)
        if loader is not None:
            loader.setdefault('pin_memory', True)
            loader.setdefault('persistent_workers', loader.get('num_workers', 0) > 0)
            loader.setdefault('collate_fn', dict(type='default_collate'))


def build_runner(cfg: Config) -> Runner:
    """The config's runner, ``Runner`` unless it names a type."""
    return RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)

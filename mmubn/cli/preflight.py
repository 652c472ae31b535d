"""Checks for all known faults, before the runner makes the work directory."""

from typing import Callable, Dict, Sequence

from mmengine.config import Config
from torch import nn

from .checkpoint_check import check_pretrained, check_start, check_weights
from .class_check import check_classes
from .data_check import check_data
from .errors import CommandError, one_line, warn
from .hook_check import check_hooks
from .metric_check import check_metrics
from .model import build_model
from .norm_check import check_norms
from .optimizer_check import check_optimizer
from .value_check import check_training, check_values
from .work_dir_check import check_results, check_work_dir

Check = Callable[[Config, nn.Module], None]


def _check_training_data(cfg: Config, model: nn.Module) -> None:
    check_classes(cfg, model, check_data(cfg, ('train', 'val')))


def _check_test_data(cfg: Config, model: nn.Module) -> None:
    check_classes(cfg, model, check_data(cfg, ('test',)))


# In the order in which they are made. All get the same model, built for them.
CHECKS: Dict[str, Sequence[Check]] = dict(
    train=(
        check_values,
        check_training,
        check_optimizer,
        _check_training_data,
        check_hooks,
        check_metrics,
        check_start,
        check_pretrained,
        check_work_dir,
    ),
    test=(check_values, _check_test_data, check_weights, check_results),
)


def preflight(cfg: Config, work: str) -> None:
    """Checks the norm layers, the data, the hooks, the checkpoints and the folders.

    A check that fails itself is told and left out: what it could not judge may be right.

    Args:
        cfg (Config): The resolved config; its default scope must be in force.
        work (str): 'train' or 'test'.

    Raises:
        CommandError: The first thing that is wrong.
    """
    check_norms(cfg)
    model = build_model(cfg)
    for check in CHECKS[work]:
        try:
            check(cfg, model)
        except CommandError:
            raise
        except Exception as error:
            warn(
                f'the check {check.__name__.lstrip("_")} cannot judge this config, and is left out '
                f'({type(error).__name__}: {one_line(error)})'
            )

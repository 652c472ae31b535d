"""Checks that the metric that a hook goes by is one that an evaluator reports."""

import inspect
from typing import Any, Iterator, List, NamedTuple, Optional, Sequence, Union

from mmengine.config import Config
from mmengine.registry import METRICS
from torch import nn

from ..walk import each, hook_nodes
from .errors import CommandError, listed
from .lookup import did_you_mean, find_class

# Arguments of mmengine's CheckpointHook and EarlyStoppingHook.
_KEYS = ('save_best', 'monitor')
_COCO_ITEMS = ('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l')


class Reported(NamedTuple):
    """What one evaluator reports: ``<prefix>/<name>``, with any name where ``names`` is None."""

    prefix: str
    names: Optional[List[str]]


def check_metrics(cfg: Config, model: nn.Module) -> None:
    """Looks among the metrics of the evaluators for those that hooks go by.

    mmengine looks for them in the first validation, after an epoch of training.

    Args:
        cfg (Config): The resolved config; its default scope must be in force.
        model (Module): Not used.

    Raises:
        CommandError: No evaluator reports a metric of that name.
    """
    reported = list(_reported(cfg))
    if not reported or None in reported:
        return
    known = [f'{prefix}/{name}' for prefix, names in reported for name in names or ('...',)]
    any_name = tuple(f'{prefix}/' for prefix, names in reported if names is None)
    for path, node in hook_nodes(cfg):
        for key in _KEYS:
            wanted = node.get(key) if isinstance(node, dict) else None
            for metric in [wanted] if isinstance(wanted, str) else wanted or ():
                if metric not in ('auto', *known) and not metric.startswith(any_name):
                    raise CommandError(
                        f"{path}.{key}: no evaluator reports '{metric}'"
                        f'{did_you_mean(metric, known)}; val_evaluator reports {listed(known)}'
                    )


def _reported(cfg: Config) -> Iterator[Optional[Reported]]:
    """Of each evaluator; None of one that cannot be seen through."""
    for _, node in each(cfg.get('val_evaluator'), 'val_evaluator'):
        kind = find_class(node, METRICS) if isinstance(node, dict) else None
        prefix = inspect.isclass(kind) and (node.get('prefix') or kind.default_prefix)
        names = _NAMES.get(getattr(kind, '__name__', ''), lambda **_: None)
        yield Reported(prefix, names(**node)) if prefix else None


def _coco_names(
    metric: Union[str, Sequence[str]] = 'bbox',
    metric_items: Optional[Sequence[str]] = None,
    classwise: bool = False,
    **_: Any,
) -> Optional[List[str]]:
    kinds = [metric] if isinstance(metric, str) else metric
    if classwise or not {'bbox', 'segm'}.issuperset(kinds):
        return None
    return [f'{kind}_{item}' for kind in kinds for item in metric_items or _COCO_ITEMS]


def _accuracy_names(
    topk: Union[int, Sequence[int]] = 1, thrs: Any = 0.0, **_: Any
) -> Optional[List[str]]:
    if isinstance(thrs, (list, tuple)):
        return None
    return [f'top{k}' for k in ([topk] if isinstance(topk, int) else topk)]


# What these call their metrics, which they do not say before they have evaluated.
_NAMES = dict(CocoMetric=_coco_names, Accuracy=_accuracy_names)

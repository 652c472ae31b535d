"""Checks before training that the UBN layers a config asks for exist and train."""

from typing import Iterator, List

from mmengine.hooks import Hook
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import layers
from ..layers.base import RectifiedBatchNorm
from ..walk import type_name, walk


class UBNCheckHook(Hook):
    """Says before training how many of the project's norm layers are built and train.

    A layer trains if it has parameters that require a gradient. The line in the log also
    counts batch norms of other types, which a config may have missed.

    It is a warning if

    - no layer trains;
    - all layers that train are in evaluation mode (``norm_eval=True``): then their
      statistics are frozen and the gate does nothing, and it is easy to copy this
      setting without noticing it. With ``frozen_statistics=True`` the warning is the other
      way round: if not all of them are;
    - ``norm_eval=True`` has no effect: some backbones look for ``nn.BatchNorm2d`` alone,
      and not for what derives from ``_BatchNorm``.

    It is an error if the config asks for a type of :mod:`mmubn.layers` and the model has
    none: something (``sync_bn``, ``convert_sync_batchnorm``) has replaced them.

    Args:
        frozen_statistics (bool): Whether frozen statistics are what the config wants.
            Default: False.

    Raises:
        RuntimeError: The layers that the config asks for are not in the model.

    Examples:
        >>> custom_hooks = [dict(type='UBNCheckHook')]
    """

    def __init__(self, frozen_statistics: bool = False) -> None:
        self.frozen_statistics = frozen_statistics

    def before_train(self, runner) -> None:
        """Counts, and logs, warns or raises."""
        # The loop does the same before its first iteration; only then is it known
        # which layers norm_eval and frozen stages hold back.
        runner.model.train()
        built = [m for m in runner.model.modules() if isinstance(m, RectifiedBatchNorm)]
        if not built:
            _raise_if_asked_for(runner)
            return
        learning = [layer for layer in built if _requires_grad(layer)]
        evaluating = sum(not layer.training for layer in learning)
        held = [layer for layer in built if not _requires_grad(layer)]
        moving = sum(layer.training for layer in held)
        frozen = len(held) - moving
        line = f'{_kinds(built)}: {len(built)} layers built, {len(learning)} train'
        if evaluating:
            line += f', {evaluating} of them with frozen statistics (norm_eval=True)'
        if frozen:
            line += f', {frozen} frozen (frozen_stages or requires_grad=False)'
        if moving:
            line += f', {moving} without gradients whose statistics move (requires_grad=False)'
        others = _others(runner.model)
        if others:
            line += f'; {len(others)} other batch norms: {_kinds(others)}'
        if not learning:
            runner.logger.warning(
                f'{line}. None of {_kinds(built)} can train: set frozen_stages=-1 in the backbone '
                'and requires_grad=True in norm_cfg.'
            )
        elif self.frozen_statistics and evaluating < len(learning):
            runner.logger.warning(
                f'{line}. frozen_statistics=True, but {len(learning) - evaluating} have statistics '
                'that train; set norm_eval=True in the backbone for those.'
            )
        elif evaluating == len(learning) and not self.frozen_statistics:
            runner.logger.warning(
                f'{line}. No batch statistics and no gate anywhere; set norm_eval=False in the '
                'backbone for those.'
            )
        else:
            runner.logger.info(line)
        for warning in without_effect(runner.model):
            runner.logger.warning(warning)


def without_effect(model: nn.Module) -> Iterator[str]:
    """A line for each module whose ``norm_eval=True`` leaves layers of ours in training mode."""
    for name, module in model.named_modules():
        if getattr(module, 'norm_eval', False) is not True:
            continue
        inside = [m for m in module.modules() if isinstance(m, RectifiedBatchNorm)]
        moving = sum(m.training for m in inside)
        if moving:
            yield (
                f'{name or "model"}: norm_eval=True has no effect on {moving} of the '
                f'{len(inside)} layers of {_kinds(inside)}: {type(module).__name__} looks for '
                'nn.BatchNorm2d alone, so they train. Set norm_eval=False if they should train, or '
                "type='BN' to freeze the statistics."
            )


def _others(model: nn.Module) -> List[nn.Module]:
    """The batch norms that are none of ours."""
    return [
        m
        for m in model.modules()
        if isinstance(m, _BatchNorm) and not isinstance(m, RectifiedBatchNorm)
    ]


def _kinds(norms: List[nn.Module]) -> str:
    return ', '.join(sorted({type(norm).__name__ for norm in norms}))


def _requires_grad(layer: nn.Module) -> bool:
    parameters = list(layer.parameters())
    # Without an affine or calibrations, all there is to train are the statistics.
    return any(p.requires_grad for p in parameters) if parameters else layer.training


def _raise_if_asked_for(runner) -> None:
    for path, node in walk(runner.cfg.get('model'), 'model'):
        kind = type_name(node)
        if kind not in layers.__all__:
            continue
        norms = [type(m).__name__ for m in _others(runner.model)]
        found = ', '.join(f'{norms.count(name)} {name}' for name in sorted(set(norms)))
        raise RuntimeError(
            f"{path} asks for '{kind}', but the model has no such layer; it has "
            f'{found or "no batch norm"}. Something replaced them after the model was built: '
            'remove sync_bn= or convert_sync_batchnorm.'
        )

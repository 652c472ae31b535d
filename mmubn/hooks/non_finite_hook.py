"""Stops or skips a step whose gradient is NaN or infinite, and says where that came from."""

import functools
from contextlib import contextmanager
from types import MethodType
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import torch
from mmengine.dist import all_reduce, get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper, OptimWrapperDict
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ..condensation import unrecorded
from .condensation_hook import unwrapped
from .random_state import RandomState, isolated_random, random_state, set_random_state

_SHOWN_IMAGES = 4


class NonFiniteHook(Hook):
    """Keeps NaN and infinity out of the weights, and names the layer that first saw them.

    The hook looks at the gradients between the backward pass and the optimizer's step. If
    one is not finite, the batch goes through the model once more, with the same random
    numbers. The log then names the losses that are not finite, the first layer with such
    output, whether its input, its weights or the layer itself is at fault, and the files of
    the images. Then the training stops before the step, or skips it.

    All processes have the same gradients, so all decide the same, without a collective.
    Mixed precision skips steps itself, when it tries a loss scale. Such a step counts only
    if a loss is not finite either.

    A skipped batch leaves weights and optimizer as they were. Running statistics moved
    before, in the forward pass. Where the features that a layer saw are not finite, those
    of :class:`mmubn.UBN` stay as they were, and those of a plain BatchNorm have the NaN.
    Where the features are finite, and only the loss or the gradient is not, the batch has
    moved both, as any other batch does.

    Args:
        action (str): ``'stop'`` or ``'skip'``. Default: ``'stop'``.
        max_skips (int): Number of such steps in a row at which the training stops anyway:
            weights that give NaN for every batch do not recover. Default: 10.

    Raises:
        FloatingPointError: In training; the message has what is described above.
        ValueError: A setting out of range.

    Examples:
        >>> custom_hooks = [dict(type='NonFiniteHook', action='skip')]
    """

    # Of the hooks that look at an iteration, the first: others would log NaN before.
    priority = 'VERY_HIGH'

    def __init__(self, action: str = 'stop', max_skips: int = 10) -> None:
        if action not in ('stop', 'skip'):
            raise ValueError(f"action must be 'stop' or 'skip', got {action!r}")
        if max_skips < 1:
            raise ValueError(f'max_skips counts steps and must be positive, got {max_skips}')
        self.action = action
        self.max_skips = max_skips
        self._skips = 0
        self._skipped = False  # in this iteration
        self._stepped = 0  # optimizers in this iteration
        # Since the last step, each with the random state before it.
        self._batches: List[Tuple[Any, RandomState]] = []
        self._losses: List[Tensor] = []  # of these batches
        # Our steps, with their optimizers and the steps that these had.
        self._watching: Dict[Callable, Tuple[Any, Callable]] = {}

    def before_train(self, runner) -> None:
        """Starts to look at every step."""
        self.after_train(runner)  # of a training that was broken off
        self._skips = 0
        self._forget()
        for wrapper in _wrappers(runner):
            self._watch_steps(runner, wrapper.optimizer)

    def _watch_steps(self, runner, optimizer) -> None:
        # Not by register_step_pre_hook: torch 2.1 runs no such hook any more once
        # torch.compile has run in the process.
        original = optimizer.step

        @functools.wraps(original)
        def step(optimizer, *args, **kwargs):
            if step in self._watching and self._may_step(runner, optimizer):
                self._stepped += 1
            return original(*args, **kwargs)

        optimizer.step = MethodType(step, optimizer)
        self._watching[step] = optimizer, original

    def after_train(self, runner) -> None:
        """Stops looking."""
        for ours, (optimizer, original) in self._watching.items():
            # Else another has put its own around ours, and keeps it.
            if getattr(optimizer.step, '__func__', None) is ours:
                optimizer.step = original
        self._watching.clear()

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        """Keeps the batch, beside those that its gradients will be added to."""
        self._batches.append((data_batch, random_state()))
        self._stepped = 0
        self._skipped = False

    def after_train_iter(
        self, runner, batch_idx: int, data_batch=None, outputs: Optional[Dict] = None
    ) -> None:
        """Looks at the losses of a step that the loss scaler skipped."""
        if outputs and 'loss' in outputs:
            self._losses.append(torch.as_tensor(outputs['loss']).detach())
        wrapper = runner.optim_wrapper
        if isinstance(wrapper, OptimWrapperDict) or wrapper.should_update():
            if not self._stepped and not self._skipped and self._losses:
                # All processes skipped it, but perhaps one of them alone has such a loss.
                bad = (~torch.stack(self._losses).isfinite()).any().float()
                all_reduce(bad, 'max')
                if bad:
                    self._act(runner)
            if self._stepped and not self._skipped:
                self._skips = 0
            self._forget()

    def _forget(self) -> None:
        self._batches.clear()
        self._losses.clear()

    def _may_step(self, runner, optimizer) -> bool:
        """Whether the optimizer will change its weights; acts where a gradient is not finite."""
        found_inf = getattr(optimizer, 'found_inf', None)
        if found_inf is not None:  # a fused optimizer, to which the loss scaler leaves the skipping
            return not found_inf
        gradients = [p.grad for group in optimizer.param_groups for p in group['params']]
        # mmengine waits for the losses in every iteration, this costs no wait beyond that.
        sums = [g.sum(dtype=torch.float64) for g in gradients if g is not None]
        if not sums or torch.stack(sums).isfinite().all():
            return bool(sums)
        self._act(runner)
        optimizer.zero_grad(set_to_none=True)  # optimizers pass over such parameters
        return False

    def _act(self, runner) -> None:
        told = [_describe(runner, batch, state) for batch, state in self._batches]
        # Of accumulated batches those at fault, if there are any.
        shown = [text for at_fault, text in told if at_fault] or [text for _, text in told]
        process = f', process {get_rank()}' if get_world_size() > 1 else ''
        report = f'iteration {runner.iter + 1}{process}: ' + '; '.join(shown)
        self._skips += not self._skipped  # of several optimizers, too, one a step
        self._skipped = True
        if self.action == 'stop':
            changed = 'No weight was changed.'
            if self._stepped:
                changed = f'{self._stepped} other optimizers had changed their weights before.'
            raise FloatingPointError(f'{report}. {changed}')
        if self._skips == self.max_skips:
            raise FloatingPointError(f'{report}. These were {self._skips} such steps in a row.')
        runner.logger.error(f'{report}. Skipped this step.')


def _wrappers(runner) -> List[OptimWrapper]:
    wrapper = runner.optim_wrapper
    return list(wrapper.values()) if isinstance(wrapper, OptimWrapperDict) else [wrapper]


def _describe(runner, batch: Any, state: RandomState) -> Tuple[bool, str]:
    """Runs a batch once more: whether it ceases to be finite before the gradient, and where."""
    model = unwrapped(runner.model)
    found: List[str] = []
    mixed_precision = _wrappers(runner)[0].optim_context(model)
    with _as_before(model), _watch(model, found), torch.no_grad(), mixed_precision:
        set_random_state(state)
        data = model.data_preprocessor(batch, True)
        losses = model._run_forward(data, mode='loss')
    where = found[0] if found else 'every layer gives finite output, so it began after them'
    if not found and get_world_size() > 1:
        where += ' or in the batch of another process, which says so'
    bad = [
        name
        for name, loss in losses.items()
        if not all(part.isfinite().all() for part in _tensors(loss))
    ]
    told = f'the losses {", ".join(bad)} are' if bad else 'every loss is finite, the gradient is'
    return bool(bad or found), f'{told} not finite: {where}{_images(batch)}'


@contextmanager
def _as_before(model: nn.Module) -> Iterator[None]:
    """Puts the buffers and the random generators back; recorders see nothing."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with isolated_random(), unrecorded():
        try:
            yield
        finally:
            for buffer, value in buffers:
                buffer.copy_(value)


@contextmanager
def _watch(model: nn.Module, found: List[str]) -> Iterator[None]:
    """Puts into ``found`` what it knows of the first layer whose output is not finite."""

    def hook_of(name: str):
        def look(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            if not found and not _finite(output):
                found.append(_blame(name, module, _finite([*args, *kwargs.values()])))

        return look

    leaves = ((name, m) for name, m in model.named_modules() if not any(m.children()))
    handles = [m.register_forward_hook(hook_of(name), with_kwargs=True) for name, m in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _blame(name: str, module: nn.Module, finite_input: bool) -> str:
    layer = f'the first layer with such output is {name} ({type(module).__name__})'
    bad = [key for key, value in module.state_dict().items() if not _finite(value)]
    if bad:
        return f'{layer}, with NaN or infinity in its {", ".join(bad)}'
    if finite_input:
        return f'{layer}, from finite input and weights'
    return f'{layer}, whose input is not finite already: the images, or what lies before it'


def _finite(value: Any) -> bool:
    return all(bool(t.isfinite().all()) for t in _tensors(value))


def _tensors(value: Any) -> List[Tensor]:
    """The floating-point tensors in nested lists, tuples and dicts."""
    leaves = tree_flatten(value)[0]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _images(batch: Any) -> str:
    samples = batch.get('data_samples') if isinstance(batch, dict) else None
    paths = [path for s in samples or () if (path := getattr(s, 'img_path', None))]
    if not paths:
        return ''
    more = f' and {len(paths) - _SHOWN_IMAGES} more' if len(paths) > _SHOWN_IMAGES else ''
    return f'; images: {", ".join(paths[:_SHOWN_IMAGES])}{more}'

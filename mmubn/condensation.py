"""Records feature condensation, layer by layer, in any model with batch norms."""

import re
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Optional

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .layers.base import recomputing
from .ops import mean_cosine_similarity
from .ops.utils import compiling, unseen

# Whether what runs is no step of the training, so no recorder is to see it.
_paused = False


@contextmanager
def unrecorded() -> Iterator[None]:
    """In which no recorder sees anything."""
    global _paused
    before, _paused = _paused, True
    try:
        yield
    finally:
        _paused = before


QUANTITIES = ('input', 'output', 'batch_statistics_used', 'running_similarity')


@contextmanager
def record_condensation(model: nn.Module, layers: str = '') -> Iterator['CondensationRecorder']:
    """Measures the norm layers of ``model`` during the forward passes inside the context.

    Args:
        model (nn.Module): Any model, in training or evaluation mode; it is left as it is.
        layers (str): Regular expression that the names of the layers to measure
            match somewhere. Default: every batch norm.

    Yields:
        CondensationRecorder: Holds what is seen, also after the context has ended.

    Raises:
        ValueError: No layer to measure, or ``layers`` is no regular expression.

    Examples:
        >>> with mmubn.record_condensation(model, 'layer4') as rec:
        ...     model(images)
        >>> rec.to_dict()['layer4.1.bn2']['input']
        0.41
        >>> pandas.DataFrame(rec.to_list())
    """
    recorder = CondensationRecorder(model, layers)
    recorder.attach()
    try:
        yield recorder
    finally:
        recorder.detach()


class CondensationRecorder:
    r"""Averages the condensation of each norm layer over the forward passes it watches.

    The condensation of a batch of features is their mean pairwise cosine similarity,

    .. math::
        s = \operatorname{mean}_{i \ne j} \cos(\mathrm{vec} X_i, \mathrm{vec} X_j).

    It is measured of the input and of the output of every ``_BatchNorm`` (BN, SyncBN,
    UBN, ...), by a forward hook that :meth:`attach` adds. If a layer is called several
    times, the mean is over its calls. A checkpointed segment counts once. A call whose
    similarity is undefined (one sample, features that are not finite) does not count.
    Passes through a compiled model are not seen.

    The hooks read the features outside the graph, write nothing to the model and draw no
    random numbers. Sums stay on the device until :meth:`state` is called.

    Args:
        model (nn.Module): The model that holds the layers.
        layers (str): As in :func:`record_condensation`.

    Raises:
        ValueError: No layer to measure, or ``layers`` is no regular expression.

    Source: UBN (arXiv 2311.15993), Definition 1 and Appendix A.
    """

    def __init__(self, model: nn.Module, layers: str = '') -> None:
        norms = {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm)}
        if not norms:
            raise ValueError(f'{type(model).__name__} holds no batch norm to measure')
        try:
            pattern = re.compile(layers)
        except (re.error, TypeError) as error:
            raise ValueError(f'layers={layers!r} is no regular expression: {error}') from error
        self.layers: Dict[str, nn.Module] = {
            name: module for name, module in norms.items() if pattern.search(name)
        }
        if not self.layers:
            raise ValueError(
                f"layers='{layers}' matches none of the {len(norms)} batch norms of "
                f"{type(model).__name__}, the first of which is '{next(iter(norms))}'"
            )
        self._totals: Dict[str, Tensor] = {}
        self._handles: List[Any] = []

    def attach(self) -> None:
        """Starts to watch, or continues if it already does."""
        self.detach()
        for name, module in self.layers.items():
            self._handles.append(module.register_forward_hook(self._hook(name), with_kwargs=True))

    def detach(self) -> None:
        """Stops watching and keeps what was seen."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def reset(self) -> None:
        """Forgets what was seen."""
        self._totals.clear()

    def _hook(self, name: str):
        @torch.no_grad()
        def observe(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
            if _paused or compiling() or recomputing():
                return
            # By place or by name, which is not the same in all norms.
            x = [*args, *kwargs.values()][0]
            with unseen():
                seen = _seen(module, x, output)
                self._totals[name] = self._totals[name] + seen if name in self._totals else seen

        return observe

    def state(self) -> Tensor:
        """What was seen, as sums and counts that add up over processes.

        Returns:
            Tensor: (L, 4, 2) on the CPU: per layer and per entry of
            :data:`QUANTITIES` the sum and the count of the values.
        """
        state = torch.zeros(len(self.layers), len(QUANTITIES), 2, device='cpu')
        for row, (name, module) in zip(state, self.layers.items()):
            if name in self._totals:
                row[:3] = self._totals[name].cpu()
            tau = getattr(module, 'running_similarity', None)
            if tau is not None and module.fct is not None:
                row[3] = torch.tensor([float(tau), 1.0], device='cpu')
        return state

    def to_dict(self, state: Optional[Tensor] = None) -> Dict[str, Dict[str, Any]]:
        """The averages by layer.

        Args:
            state (Tensor, optional): A :meth:`state`, for instance summed over
                processes. Default: what this recorder has seen.

        Returns:
            dict[str, dict]: For each layer ``type``, ``input`` and ``output`` (mean
            similarity), ``batch_statistics_used`` (share of the watched training
            steps that used batch statistics) and ``running_similarity``; None where
            there is no value, the last two for layers without a gate.
        """
        state = self.state() if state is None else state
        averages = {}
        for row, (name, module) in zip(state.tolist(), self.layers.items()):
            means = [total / count if count else None for total, count in row]
            averages[name] = {'type': type(module).__name__, **dict(zip(QUANTITIES, means))}
        return averages

    def to_list(self, state: Optional[Tensor] = None) -> List[Dict[str, Any]]:
        """:meth:`to_dict` in tidy form, two rows a layer, ready for ``pandas.DataFrame``.

        Returns:
            list[dict]: Rows of ``layer``, ``type``, ``where`` ('input' or 'output'),
            ``similarity``, ``running_similarity`` and ``batch_statistics_used``.
        """
        return [
            {
                'layer': layer,
                'type': values['type'],
                'where': where,
                'similarity': values[where],
                'running_similarity': values['running_similarity'],
                'batch_statistics_used': values['batch_statistics_used'],
            }
            for layer, values in self.to_dict(state).items()
            for where in ('input', 'output')
        ]


def _seen(module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
    """(3, 2): the first three of :data:`QUANTITIES`, each with whether it is defined."""
    nan = torch.full((), float('nan'), device=x.device)
    used = getattr(module, 'batch_statistics_used', None) if module.training else None
    values = torch.stack(
        [
            mean_cosine_similarity(x).float(),
            mean_cosine_similarity(output).float(),
            nan if used is None else used.float(),
        ]
    )
    defined = values.isfinite()
    return torch.stack([torch.where(defined, values, 0.0), defined.float()], dim=1)

"""Which gates a threshold would shut: the similarity of every norm layer on one's own data."""

import copy
import math
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Union

import torch
from torch import Tensor, nn

from .condensation import record_condensation
from .runs import read_condensation

THRESHOLDS = tuple(step / 20 for step in range(1, 11))  # 0.05, 0.1, ... 0.5


@dataclass(frozen=True)
class LayerSimilarity:
    """The similarity of the input of one norm layer.

    Attributes:
        layer (str): Its name in the model.
        type (str): Its class.
        similarity (float): Mean over the batches; of a run, over the last epoch. NaN if
            it is not defined for any of these.
        lowest (float): Lowest of the batches; of a run, of the epochs.
        highest (float): Highest of the same.
    """

    layer: str
    type: str
    similarity: float
    lowest: float
    highest: float

    def is_shut(self, threshold: float) -> bool:
        """Whether UBN's gate would be shut, as its running similarity tends to this mean."""
        return self.similarity <= threshold


@dataclass(frozen=True)
class SimilaritySurvey:
    """The similarities of a model's norm layers, and which gates a threshold would shut.

    Attributes:
        layers (list[LayerSimilarity]): In the model's order.
        source (str): What was measured.
        thresholds (tuple[float, ...]): The thresholds of the table, ascending.
        held (int): Number of layers in evaluation mode while the model trained. They use
            no gate.
    """

    layers: List[LayerSimilarity]
    source: str
    thresholds: Sequence[float] = THRESHOLDS
    held: int = 0

    @property
    def measured(self) -> List[LayerSimilarity]:
        """The layers with a similarity."""
        return [layer for layer in self.layers if not math.isnan(layer.similarity)]

    def shut(self, threshold: float) -> List[str]:
        """Names of the layers whose gates the threshold would shut."""
        return [layer.layer for layer in self.measured if layer.is_shut(threshold)]

    @property
    def most_shut_from(self) -> Optional[float]:
        """The lowest of the thresholds that shuts more than half of the gates, if one does."""
        half = len(self.measured) / 2
        return next((t for t in self.thresholds if len(self.shut(t)) > half), None)

    def warnings(self) -> List[str]:
        """What to consider before training, one line each."""
        found = []
        most = self.most_shut_from
        if most is not None:
            found.append(
                f'from fct={most:g} on most gates would be shut ({len(self.shut(most))} of '
                f'{len(self.measured)}): these layers would train with statistics that no longer '
                'move. Stay below.'
            )
        if self.held:
            found.append(
                f'{self.held} of {len(self.layers)} layers are held in evaluation mode '
                '(norm_eval=True, frozen_stages): no gate works there, whatever fct is.'
            )
        unseen = [layer.layer for layer in self.layers if math.isnan(layer.similarity)]
        if unseen:
            found.append(
                f'no similarity of {len(unseen)} layers (not called, inside of torch.compile, or '
                f'never with two finite images): {unseen[0]}, ...'
            )
        return found

    def __str__(self) -> str:
        """The table, one line per layer, with `x` where the gate would be shut; the warnings."""
        width = max(len(layer.layer) for layer in self.layers)
        columns = ''.join(f'{t:>6g}' for t in self.thresholds)
        lines = [
            self.source,
            f'{"":<{width}}  {"similarity of the input":^26}  gate shut (x) at fct =',
            f'{"layer":<{width}}  {"mean":>8} {"lowest":>8} {"highest":>8}  {columns}',
        ]
        for layer in self.layers:
            numbers = (layer.similarity, layer.lowest, layer.highest)
            cells = ' '.join(f'{"-" if math.isnan(v) else f"{v:.3f}":>8}' for v in numbers)
            marks = ''.join(f'{"x" if layer.is_shut(t) else ".":>6}' for t in self.thresholds)
            lines.append(f'{layer.layer:<{width}}  {cells}  {marks}')
        counts = ''.join(f'{len(self.shut(t)):>6}' for t in self.thresholds)
        lines.append(f'{f"shut, of {len(self.measured)}":<{width}}  {"":>26}  {counts}')
        return '\n'.join([*lines, *(f'warning: {line}' for line in self.warnings())])

    def to_list(self) -> List[Dict[str, Any]]:
        """Tidy rows, ready for ``csv.DictWriter`` or ``pandas.DataFrame``."""
        return [
            {**vars(layer), **{f'shut_at_{t:g}': layer.is_shut(t) for t in self.thresholds}}
            for layer in self.layers
        ]

    def plot(self, path: Union[str, Path]) -> None:
        """Draws the similarity of each layer, with its range, against the thresholds.

        Args:
            path (str | Path): File of the picture; its suffix gives the format. Needs
                matplotlib.
        """
        from matplotlib.figure import Figure

        rows = range(len(self.layers))
        means = [layer.similarity for layer in self.layers]
        ranges = [
            [layer.similarity - layer.lowest for layer in self.layers],
            [layer.highest - layer.similarity for layer in self.layers],
        ]
        figure = Figure(figsize=(7, min(1.6 + 0.16 * len(means), 16)), layout='constrained')
        axis, below = figure.subplots(
            2, 1, sharex=True, height_ratios=(max(2.0, 0.16 * len(means)), 1)
        )
        axis.errorbar(means, rows, xerr=ranges, fmt='o', markersize=3, color='black', capsize=2)
        for threshold in self.thresholds:
            axis.axvline(threshold, color='0.8', linewidth=0.8, zorder=0)
        step = math.ceil(len(means) / 90)
        axis.set_yticks(rows[::step], [layer.layer for layer in self.layers][::step], fontsize=6)
        axis.invert_yaxis()
        axis.set_title(self.source, fontsize=8)
        shut = [len(self.shut(t)) for t in self.thresholds]
        below.step(self.thresholds, shut, where='mid', color='black', marker='o', markersize=3)
        below.axhline(len(self.measured) / 2, color='0.45', linestyle='--', linewidth=0.8)
        below.set(ylabel='gates shut', xlabel='similarity of the input; threshold fct')
        below.set_ylim(-0.5, len(self.measured) + 0.5)
        figure.savefig(path, dpi=140)


def survey_similarity(
    model: nn.Module,
    batches: Iterable,
    num_batches: int = 20,
    thresholds: Sequence[float] = THRESHOLDS,
    forward: Optional[Callable[[nn.Module, Any], Any]] = None,
    layers: str = '',
) -> SimilaritySurvey:
    r"""Measures the similarity at every norm layer, as training with UBN would see it.

    A copy of the model runs in training mode, without gradients; the model itself and
    torch's random generators stay as they are. A layer's running similarity
    :math:`\tau` tends to the mean over the batches of

    .. math::
        s = \operatorname{mean}_{i \ne j} \cos(\mathrm{vec} X_i, \mathrm{vec} X_j),

    so its gate would be shut at every threshold that is not below this mean. Similarities
    move in training: those of a trained network, with any batch norm, tell more than those
    of initial weights. Use the batch size of the training: smaller batches scatter more, and
    are less alike behind a norm layer.

    Args:
        model (nn.Module): With BatchNorm, UBN or any other ``_BatchNorm``.
        batches (Iterable): A loader of the training data.
        num_batches (int): Largest number of batches to take. Default: 20.
        thresholds (Sequence[float]): Thresholds to report on. Default: 0.05, 0.1, ... 0.5.
        forward (Callable, optional): ``forward(model, batch)`` runs the model. Default:
            ``model(batch)``, or ``model(batch[0])`` of a tuple or list, on the device of
            the parameters.
        layers (str): As in :func:`mmubn.record_condensation`.

    Returns:
        SimilaritySurvey: ``print`` it for the table.

    Raises:
        ValueError: No norm layer, ``num_batches`` below 1, no batch, or batches of single images.
        TypeError: Batches that the default ``forward`` cannot take apart.

    Source: UBN (arXiv 2311.15993), Definition 1 and Eq. 3; the survey is ours.

    Examples:
        >>> print(mmubn.survey_similarity(model, train_loader))
    """
    if num_batches < 1:
        raise ValueError(f'num_batches must be at least 1, got {num_batches}')
    seen: Dict[str, List[float]] = {}
    taken = 0
    run = forward or _run
    # A compiled model runs no hooks; this is the one that torch.compile was given.
    copied = copy.deepcopy(getattr(model, '_orig_mod', model))
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    with (
        torch.random.fork_rng(devices),
        torch.no_grad(),
        record_condensation(copied, layers) as recorder,
    ):
        copied.train()
        held = sum(not module.training for module in recorder.layers.values())
        for batch in islice(batches, num_batches):
            recorder.reset()
            run(copied, batch)
            for name, values in recorder.to_dict().items():
                if values['input'] is not None:
                    seen.setdefault(name, []).append(values['input'])
            taken += 1
    if not taken:
        raise ValueError('batches: there is none')
    if not seen:
        raise ValueError(
            f'no similarity in {taken} batches: it compares pairs of images, so a batch needs two, '
            'with finite features; layers inside of torch.compile are not seen'
        )
    measured = [
        _layer(name, type(module).__name__, seen.get(name, []))
        for name, module in recorder.layers.items()
    ]
    source = f'{type(copied).__name__}, {taken} training batches'
    return SimilaritySurvey(measured, source, sorted(thresholds), held)


def read_survey(
    path: Union[str, Path], thresholds: Sequence[float] = THRESHOLDS
) -> SimilaritySurvey:
    """The survey of a training that :class:`~mmubn.hooks.CondensationHook` recorded.

    The similarity is that of the last epoch's training batches, NaN for a layer without one
    in that epoch. Lowest and highest are those of all epochs.

    Args:
        path (str | Path): The work directory, or ``condensation.csv`` itself.
        thresholds (Sequence[float]): To report on. Default: 0.05, 0.1, ... 0.5.

    Raises:
        FileNotFoundError: There is none.
        ValueError: The file is no such table, or has no training batches.
    """
    rows = [row for row in read_condensation(path) if row['where'] == 'train/input']
    if not rows:
        raise ValueError(f'{path} has no training batches yet (rows of train/input)')
    records = {row['iter'] for row in rows}
    types = {row['layer']: row['type'] for row in rows}
    seen: Dict[str, Dict[int, float]] = {name: {} for name in types}  # layer -> iteration -> value
    for row in rows:
        if row['similarity'] is not None:
            seen[row['layer']][row['iter']] = row['similarity']
    measured = []
    for name, kind in types.items():
        layer = _layer(name, kind, [*seen[name].values()])
        measured.append(replace(layer, similarity=seen[name].get(max(records), math.nan)))
    source = f'{path}: the last of {len(records)} records'
    return SimilaritySurvey(measured, source, sorted(thresholds))


def _layer(name: str, kind: str, values: List[float]) -> LayerSimilarity:
    if not values:
        return LayerSimilarity(name, kind, math.nan, math.nan, math.nan)
    return LayerSimilarity(name, kind, sum(values) / len(values), min(values), max(values))


def _run(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, (list, tuple)):
        batch = batch[0]
    if not isinstance(batch, Tensor):
        raise TypeError(
            f'a batch is of type {type(batch).__name__}, not images: '
            'pass forward=lambda model, batch: ...'
        )
    device = next((p.device for p in model.parameters()), batch.device)
    model(batch.to(device))

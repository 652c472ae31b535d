"""Records feature condensation while a Runner trains."""

import copy
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch
from mmengine.dataset import pseudo_collate
from mmengine.dist import all_reduce, is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import IterBasedTrainLoop, set_random_seed
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from ..condensation import QUANTITIES, CondensationRecorder, record_condensation
from .condensation_table import CondensationTable
from .random_state import isolated_random

_SHOWN_NAMES = 8


class CondensationHook(Hook):
    """Records the condensation of every batch norm: mean cosine similarity between samples.

    Two measurements, of the input and of the output of each layer:

    - ``train``: training batches, every ``interval`` iterations from the first of an
      epoch, averaged over the epoch;
    - ``fixed``: one random batch that stays the same, in evaluation mode, before the
      first epoch and at the end of each, as in the paper's Appendix A. Its samples come
      from the validation set if there is just one, and otherwise from a copy of the
      training set. All its images are padded to one size. If every layer is in the backbone or
      the neck, only these run.

    An iteration-based loop has no epochs. There, every ``val_interval``-th iteration and
    the last one count as the end of an epoch.

    Both go to the visualizer as means over groups of layers (``condensation/<first two
    parts of the layer's parent>/<where>``, over iterations). They also go to
    ``condensation.csv`` in the work directory, layer by layer, with the columns

    - ``epoch``, ``iter``: the number finished, 0 before the first;
    - ``layer``, ``type``: its name in the model and its class;
    - ``where``: ``train/input``, ``train/output``, ``fixed/input`` or ``fixed/output``;
    - ``similarity``: empty if undefined (layer not called, single samples);
    - ``running_similarity``: of a layer with a gate (UBN), empty for others;
    - ``batch_statistics_used``: the share of the measured training steps that
      normalised with batch statistics (gate open). It is empty without a gate, and for
      ``fixed``, because evaluation always uses the running statistics.

    The log gets one line per epoch: how many layers are condensed, and which gates
    changed. A gate counts as open if batch statistics were used in at least half of the
    measured steps.

    With several processes, everything is averaged over them. A resumed run keeps the rows
    up to its checkpoint and continues after them. All other rows, also those of another
    training in the same work directory, are kept in a file ``condensation_<time>.csv``,
    and the log says so. Weights, buffers and the state of the random generators are those
    of a training without the hook. The trained weights are measured, not their EMA. Under
    ``torch.compile`` the training batches are not seen.

    Args:
        layers (str): Regular expression that the names of the layers to measure match
            somewhere. Default: every batch norm.
        interval (int): Number of iterations from one measured training batch to the next.
            Default: 20.
        fixed_samples (int): Size of the fixed batch, which goes through the model at
            once. Take fewer if memory is short, 0 for no fixed batch. Default: 32.
        threshold (float): Similarity of ``fixed/input`` (``train/input`` without fixed
            batch) above which the log calls a layer condensed. Default: 0.3.
        seed (int): Seed for the choice of the fixed batch. Default: 0.

    Raises:
        RuntimeError: In training; the fixed batch does not go through the model at once.
        ValueError: A setting out of range, no layer to measure, or no data set to draw the fixed
            batch from by index.

    Source: UBN (arXiv 2311.15993), Definition 1, section 3.2 and Appendix A.

    Examples:
        >>> custom_hooks = [dict(type='CondensationHook')]
    """

    # After the hooks that move weights and buffers, before the checkpoint is written.
    priority = 'LOW'

    def __init__(
        self,
        layers: str = '',
        interval: int = 20,
        fixed_samples: int = 32,
        threshold: float = 0.3,
        seed: int = 0,
    ) -> None:
        if interval < 1:
            raise ValueError(f'interval counts iterations and must be positive, got {interval}')
        if fixed_samples < 0:
            raise ValueError(f'fixed_samples cannot be negative, got {fixed_samples}')
        self.layers = layers
        self.interval = interval
        self.fixed_samples = fixed_samples
        self.threshold = threshold
        self.seed = seed
        self._recorder: Optional[CondensationRecorder] = None
        # Of the training batches since the last record, the sums over all processes: only
        # one of them writes the checkpoint, all read it.
        self._seen: Optional[Tensor] = None
        self._resumed: Optional[dict] = None

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Keeps what a resumed checkpoint says of averages begun and of its table."""
        self._resumed = checkpoint.get('condensation') if runner._resume else None

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Saves the averages begun between two records, and what the table is known by."""
        if self._recorder is not None:
            checkpoint['condensation'] = dict(
                layers=list(self._recorder.layers),
                state=self._seen,
                table=self._table.digest if is_main_process() else '',
            )

    def before_train(self, runner) -> None:
        """Opens the table and measures the fixed batch."""
        self._recorder = CondensationRecorder(unwrapped(runner.model), self.layers)
        if self._resumed and self._resumed['layers'] == list(self._recorder.layers):
            self._seen = self._resumed['state'].cpu()
        else:
            self._seen = torch.zeros_like(self._recorder.state())
        self._by_epoch = not isinstance(runner.train_loop, IterBasedTrainLoop)
        self._batch = self._draw_batch(runner) if self.fixed_samples else None
        # Gates start open: of running statistics there are none yet.
        self._gates: Dict[str, bool] = {}
        kept = []
        if is_main_process():
            digest = (self._resumed or {}).get('table', '')
            self._table = CondensationTable(
                Path(runner.work_dir), runner.timestamp, runner.iter, digest
            )
            for note in self._table.notes:
                runner.logger.warning(note)
            kept = self._table.rows
            self._gates = _gates(kept)
        fixed = self._measure_batch(runner)
        if fixed is not None and not kept:
            self._record(runner, runner.epoch, runner.iter, {'fixed': fixed})
        self._last_iter = runner.iter

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        """Watches every ``interval``-th batch."""
        if batch_idx % self.interval == 0:
            self._recorder.attach()

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Adds what was seen, and records at the interval of an iteration-based loop."""
        self._recorder.detach()
        if batch_idx % self.interval == 0:
            seen = _summed(self._recorder)
            # This is a state at the time of the record, not a sum over iterations.
            seen[:, QUANTITIES.index('running_similarity')] = 0
            self._seen += seen
            self._recorder.reset()
        done = runner.iter + 1
        if not self._by_epoch and (
            done % runner.train_loop.val_interval == 0 or done == runner.max_iters
        ):
            self._end_period(runner, runner.epoch, done)

    def after_train_epoch(self, runner) -> None:
        """Records the epoch."""
        if runner.iter != self._last_iter:
            self._end_period(runner, runner.epoch + self._by_epoch, runner.iter)

    def after_train(self, runner) -> None:
        """Closes the table."""
        if is_main_process():
            self._table.close()

    def _end_period(self, runner, epoch: int, done: int) -> None:
        states = {'train': self._seen + _summed(self._recorder)}
        self._seen.zero_()
        fixed = self._measure_batch(runner)
        if fixed is not None:
            states['fixed'] = fixed
        self._record(runner, epoch, done, states)
        self._last_iter = done

    def _draw_batch(self, runner) -> Any:
        """The fixed batch, collated and not yet preprocessed."""
        # A loop of one's own may validate on several sets, and so have no one loader.
        of_val = getattr(runner.val_loop, 'dataloader', None)
        loader = runner.train_dataloader if of_val is None else of_val
        dataset = loader.dataset
        if isinstance(dataset, IterableDataset):
            raise ValueError(
                'CondensationHook: its fixed batch is drawn by index, and '
                f'{type(dataset).__name__} is an IterableDataset; set fixed_samples=0 to train '
                'without one, or validate on a data set with indices'
            )
        if of_val is None:
            # Transforms may keep a state, such as Mosaic's cache, that training must not lose.
            dataset = copy.deepcopy(dataset)
        generator = torch.Generator().manual_seed(self.seed)
        indices = torch.randperm(len(dataset), generator=generator)[: self.fixed_samples]
        with _seeded(self.seed):
            samples = [dataset[i] for i in indices.tolist()]
        try:
            return loader.collate_fn(samples)
        except RuntimeError:
            # Images of several sizes, which the loader meets one by one; what a data
            # preprocessor gets as a list it pads.
            return pseudo_collate(samples)

    def _measure_batch(self, runner) -> Optional[Tensor]:
        """State of a recorder over the fixed batch, summed over processes."""
        if self._batch is None:
            return None
        model = unwrapped(runner.model)
        try:
            with (
                record_condensation(model, self.layers) as recorder,
                _seeded(self.seed),
                _evaluation(model),
                torch.no_grad(),
            ):
                _run(model, self._batch, recorder)
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise RuntimeError(
                'CondensationHook: its fixed batch does not go through the model at once; set '
                'fixed_samples to fewer images where memory is short, or to 0 to train without '
                f'such a batch: {reason}'
            ) from error
        return _summed(recorder)

    def _record(self, runner, epoch: int, done: int, states: Dict[str, Tensor]) -> None:
        rows = [
            {'epoch': epoch, 'iter': done, **row, 'where': f'{source}/{row["where"]}'}
            for source, state in states.items()
            for row in self._recorder.to_list(state)
        ]
        if is_main_process():
            self._table.append(rows)
        runner.visualizer.add_scalars(_group_means(rows), step=done)
        runner.logger.info(self._summary(epoch, done, rows))

    def _summary(self, epoch: int, done: int, rows: List[dict]) -> str:
        """The line of the log; moves on to the new gates."""
        where = 'fixed/input' if self.fixed_samples else 'train/input'
        similarities = [row['similarity'] for row in rows if row['where'] == where]
        condensed = sum(s is not None and s > self.threshold for s in similarities)
        when = f'epoch {epoch}' if self._by_epoch else f'iteration {done}'
        line = (
            f'Condensation at {when}: {condensed} of {len(similarities)} layers condensed '
            f'({where} similarity > {self.threshold:g})'
        )
        gates = _gates(rows)
        if gates:
            opened = [n for n, is_open in gates.items() if is_open > self._gates.get(n, True)]
            shut = [n for n, is_open in gates.items() if is_open < self._gates.get(n, True)]
            self._gates.update(gates)
            line += (
                f'; {sum(gates.values())} of {len(gates)} gates open; '
                f'opened: {_names(opened)}; shut: {_names(shut)}'
            )
        return line


def _summed(recorder: CondensationRecorder) -> Tensor:
    """State of a recorder, summed over processes, all of which must come here."""
    state = recorder.state()
    all_reduce(state, 'sum')
    return state


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of DistributedDataParallel and the like."""
    return model.module if is_model_wrapper(model) else model


@contextmanager
def _seeded(seed: int):
    """Seeds the global random generators and puts them back as they were."""
    with isolated_random():
        set_random_seed(seed)
        yield


@contextmanager
def _evaluation(model: nn.Module):
    """Evaluation mode, then for each module the mode it was in (norm_eval, frozen stages)."""
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _run(model: nn.Module, batch: Any, recorder: CondensationRecorder) -> None:
    """Runs what holds the layers: heads cost much on 32 images and seldom hold one."""
    if hasattr(model, 'extract_feat') and all(
        name.startswith(('backbone.', 'neck.')) for name in recorder.layers
    ):
        model.extract_feat(model.data_preprocessor(batch, False)['inputs'])
    else:
        model.val_step(batch)


def _group_means(rows: List[dict]) -> Dict[str, float]:
    """Scalars for the visualizer: means over the layers of a group, and over all layers."""
    values: Dict[str, List[float]] = {}
    for row in rows:
        named = {row['where']: row['similarity']}
        if row['where'] == 'train/input':
            named['running_similarity'] = row['running_similarity']
            named['batch_statistics_used'] = row['batch_statistics_used']
        for name, value in named.items():
            if value is not None:
                for group in ('all', _group(row['layer'])):
                    values.setdefault(f'condensation/{group}/{name}', []).append(value)
    return {name: sum(group) / len(group) for name, group in values.items()}


def _group(layer: str) -> str:
    """``backbone.layer1`` for ``backbone.layer1.0.bn2``."""
    return '.'.join(layer.split('.')[:-1][:2]) or layer


def _gates(rows: List[dict]) -> Dict[str, bool]:
    """Whether each layer's gate is open, as the last row that says so has it."""
    return {
        row['layer']: row['batch_statistics_used'] >= 0.5
        for row in rows
        if row['batch_statistics_used'] is not None
    }


def _names(layers: List[str]) -> str:
    shown = ', '.join(layers[:_SHOWN_NAMES]) or 'none'
    return f'{shown} and {len(layers) - _SHOWN_NAMES} more' if layers[_SHOWN_NAMES:] else shown

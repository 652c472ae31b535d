"""Each promise of the hook, in a Runner that really trains."""

import copy
import json
import re
import shutil
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from against_reference import pairwise
from holder import FORK
from mmengine.hooks import Hook
from mmengine.model import BaseDataPreprocessor, MMDistributedDataParallel, stack_batch
from mmengine.optim import OptimWrapper
from mmengine.registry import LOOPS
from mmengine.runner import BaseLoop
from processes import in_processes
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from toy_runner import (
    HOOK,
    Accuracy,
    ToyImages,
    ToyNet,
    assert_same_training,
    column,
    hook_of,
    loader,
    log_of,
    make_runner,
    table,
)

from mmubn.hooks import CondensationHook, condensation_hook
from mmubn.hooks.condensation_table import CondensationTable
from mmubn.runs import read_condensation


def by_iteration(interval):
    """Checkpoints every few iterations, as ``default_hooks``."""
    return dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=interval))


def spy(model, layer='stem.1'):
    """Every similarity of a layer's input in training, from the N x N matrix."""
    seen = []
    model.get_submodule(layer).register_forward_hook(
        lambda module, args, y: seen.append(pairwise(args[0])) if module.training else None
    )
    return seen


@pytest.mark.parametrize('val', [True, False])
def test_weights_are_bit_equal_with_and_without(tmp_path, val):
    # Augmentation and dropout draw from every global generator, the training
    # transform has a memory, and without a validation set the hook reads the
    # training set itself.
    assert_same_training(
        tmp_path,
        HOOK,
        model=lambda: ToyNet(dropout=0.3, fct=0.3, fct_warmup=2),
        train_dataloader=lambda: loader(ToyImages(augment=True), shuffle=True),
        val=lambda: val and ToyImages(size=48, augment=True, seed=1),
    )


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
    """A Runner after two epochs with the hook, and every similarity of its two layers."""
    runner = make_runner(tmp_path_factory.mktemp('plain'), hooks=[HOOK])
    seen = [spy(runner.model, layer) for layer in ('stem.1', 'norm')]
    runner.train()
    return runner, *seen


@pytest.fixture
def copied(plain, tmp_path):
    """A copy of its work dir."""
    return shutil.copytree(plain[0].work_dir, tmp_path / 'copied')


def test_training_rows_are_the_epoch_means(plain):
    runner, seen, _ = plain
    rows = table(runner.work_dir)
    expected = [sum(seen[:4]) / 4, sum(seen[4:]) / 4]
    recorded = column(rows, layer='stem.1', where='train/input')
    assert recorded == pytest.approx(expected, abs=1e-6)
    assert abs(expected[0] - expected[1]) > 1e-4
    assert column(rows, 'iter', layer='stem.1', where='train/input') == [4, 8]
    assert column(rows, 'epoch', layer='stem.1', where='train/input') == [1, 2]


def test_interval_counts_from_the_start_of_an_epoch(tmp_path):
    runner = make_runner(tmp_path, hooks=[dict(HOOK, interval=3)])
    seen = spy(runner.model)
    runner.train()
    expected = [(seen[0] + seen[3]) / 2, (seen[4] + seen[7]) / 2]
    recorded = column(table(tmp_path), layer='stem.1', where='train/input')
    assert recorded == pytest.approx(expected, abs=1e-6)


def test_layer_called_twice_is_averaged(plain):
    runner, _, seen = plain
    assert len(seen) == 16
    recorded = column(table(runner.work_dir), layer='norm', where='train/input')
    assert recorded == pytest.approx([sum(seen[:8]) / 8, sum(seen[8:]) / 8], abs=1e-6)


def test_fixed_batch_is_evaluated_before_the_first_and_after_every_epoch(tmp_path):
    runner = make_runner(tmp_path, hooks=[dict(HOOK, fixed_samples=16, seed=3)])
    expected = []

    def measure():
        chosen = torch.randperm(48, generator=torch.Generator().manual_seed(3))[:16]
        model = runner.model.eval()
        features = model.stem[0](ToyImages(size=48, seed=1).images[chosen])
        expected.append((pairwise(features), pairwise(model.stem[1](features))))

    measure()
    runner.train()
    measure()
    rows = table(tmp_path)
    assert column(rows, 'epoch', layer='stem.1', where='fixed/input') == [0, 1, 2]
    for position, where in enumerate(('fixed/input', 'fixed/output')):
        recorded = column(rows, layer='stem.1', where=where)
        before, after = (pair[position] for pair in expected)
        assert [recorded[0], recorded[-1]] == pytest.approx([before, after], abs=1e-6)
        assert len(set(recorded)) == 3


def test_module_modes_are_put_back(tmp_path):
    class HalfFrozen(ToyNet):
        def train(self, mode=True):
            super().train(mode)
            self.stem.eval()
            return self

    runner = make_runner(tmp_path, HalfFrozen(), hooks=[HOOK], epochs=1, val=False)
    runner.train()
    assert not runner.model.stem[1].training
    assert runner.model.stem[1].num_batches_tracked == 0
    assert runner.model.norm.training


def test_pattern_and_no_fixed_batch(tmp_path):
    make_runner(tmp_path, hooks=[dict(HOOK, layers='^norm$', fixed_samples=0)]).train()
    rows = table(tmp_path)
    assert {r['layer'] for r in rows} == {'norm'}
    assert {r['where'] for r in rows} == {'train/input', 'train/output'}


class CPUAutocast(OptimWrapper):
    """AmpOptimWrapper's forward; that class itself refuses to work without a GPU."""

    @contextmanager
    def optim_context(self, model):
        with super().optim_context(model), torch.autocast('cpu', torch.bfloat16):
            yield


def test_amp(tmp_path):
    optim_wrapper = dict(type=CPUAutocast, optimizer=dict(type='SGD', lr=0.1, momentum=0.9))
    runner = make_runner(tmp_path / 'spied', hooks=[HOOK], optim_wrapper=optim_wrapper)
    seen, dtypes = spy(runner.model), set()
    runner.model.norm.register_forward_pre_hook(lambda _, args: dtypes.add(args[0].dtype))
    runner.train()
    assert torch.bfloat16 in dtypes
    recorded = column(table(tmp_path / 'spied'), layer='stem.1', where='train/input')
    assert recorded == pytest.approx([sum(seen[:4]) / 4, sum(seen[4:]) / 4], abs=1e-6)
    assert_same_training(tmp_path, HOOK, optim_wrapper=lambda: dict(optim_wrapper))


def test_gradient_accumulation(tmp_path):
    optimizer = dict(type='SGD', lr=0.1, momentum=0.9)
    wrapper = dict(accumulative_counts=2, optimizer=optimizer)
    runner = assert_same_training(tmp_path, HOOK, optim_wrapper=lambda: copy.deepcopy(wrapper))
    rows = table(runner.work_dir)
    assert column(rows, 'iter', layer='norm', where='train/input') == [4, 8]


def test_ema_leaves_both_models_alone_and_the_trained_one_is_measured(plain, tmp_path):
    def ema():
        return [dict(type='EMAHook', momentum=0.5, update_buffers=True)]

    runner = assert_same_training(tmp_path, HOOK, hooks=ema)
    # EMA changes no training, so the trained weights give the same table.
    assert table(runner.work_dir) == table(plain[0].work_dir)
    averaged = [
        torch.load(tmp_path / name / 'epoch_2.pth', weights_only=False)['state_dict']
        for name in ('without', 'with')
    ]
    assert all(torch.equal(averaged[0][key], averaged[1][key]) for key in averaged[0])


def test_resume_appends_without_gap_or_double_row(tmp_path):
    make_runner(tmp_path / 'whole', hooks=[HOOK], epochs=4).train()
    make_runner(tmp_path / 'parts', hooks=[HOOK], epochs=3).train()
    # As if the run had died in epoch 3, with the table ahead of the checkpoint.
    (tmp_path / 'parts' / 'epoch_3.pth').unlink()
    (tmp_path / 'parts' / 'last_checkpoint').write_text(str(tmp_path / 'parts' / 'epoch_2.pth'))
    with (tmp_path / 'parts' / 'condensation.csv').open('a') as file:
        file.write('4,1')
    make_runner(tmp_path / 'parts', hooks=[HOOK], epochs=4, resume=True).train()

    rows = table(tmp_path / 'parts')
    keys = [(r['epoch'], r['iter'], r['layer'], r['where']) for r in rows]
    assert len(set(keys)) == len(keys)
    assert rows == table(tmp_path / 'whole')


def other_tables(work_dir):
    return [path for path in work_dir.glob('condensation*.csv') if path.name != 'condensation.csv']


def test_new_training_in_an_old_work_dir_keeps_the_old_table(copied):
    before = (copied / 'condensation.csv').read_bytes()
    runner = make_runner(copied, hooks=[HOOK], epochs=1)
    runner.train()
    assert column(table(copied), 'epoch', layer='norm', where='fixed/input') == [0, 1]
    (old,) = other_tables(copied)
    assert old.read_bytes() == before
    assert f'condensation.csv is of another training: kept as {old}' in log_of(runner)


def test_rows_beyond_an_earlier_checkpoint_are_kept_aside(tmp_path):
    make_runner(tmp_path, hooks=[HOOK], epochs=3).train()
    before = (tmp_path / 'condensation.csv').read_bytes()
    checkpoint = str(tmp_path / 'epoch_1.pth')
    make_runner(tmp_path, hooks=[HOOK], epochs=2, resume=True, load_from=checkpoint).train()
    assert column(table(tmp_path), 'epoch', layer='norm', where='fixed/input') == [0, 1, 2]
    (old,) = other_tables(tmp_path)
    assert old.read_bytes() == before


def test_a_start_by_mistake_between_a_training_and_its_resumption(copied):
    before = table(copied)
    begun = make_runner(copied, hooks=[HOOK], epochs=3)  # without resume=True, and broken off
    hook_of(begun, CondensationHook).before_train(begun)
    runner = make_runner(copied, hooks=[HOOK], epochs=3, resume=True)
    runner.train()
    rows = table(copied)
    assert rows[: len(before)] == before
    assert column(rows, 'epoch', layer='norm', where='fixed/input') == [0, 1, 2, 3]
    assert 'condensation.csv is of another training: kept as' in log_of(runner)
    tables = map(read_condensation, other_tables(copied))
    assert {row['epoch'] for rows in tables for row in rows} == {0, 1, 2}


def test_a_foreign_file_is_kept(tmp_path):
    (tmp_path / 'condensation.csv').write_text('mine')
    make_runner(tmp_path, hooks=[HOOK], epochs=1).train()
    assert [path.read_text() for path in other_tables(tmp_path)] == ['mine']


def write_rows(work_dir, opened, ended):
    """Another training: a row, and a second one once this one has ended."""
    writer = CondensationTable(work_dir, 'first')
    row = dict(epoch=1, iter=1, layer='a', type='UBN', where='fixed/input')
    writer.append([row])
    opened.set()
    ended.wait(60)
    writer.append([dict(row, epoch=2)])


def test_two_trainings_at_once_do_not_mix_their_rows(tmp_path):
    opened, ended = FORK.Event(), FORK.Event()
    first = FORK.Process(target=write_rows, args=(tmp_path, opened, ended), daemon=True)
    first.start()
    assert opened.wait(60)
    runner = make_runner(tmp_path, hooks=[HOOK], epochs=1)
    runner.train()
    ended.set()
    first.join()
    assert column(table(tmp_path), 'epoch', layer='a') == [1, 2]
    (second,) = other_tables(tmp_path)
    assert second.name == f'condensation_{runner.timestamp}.csv'
    assert {row['epoch'] for row in read_condensation(second)} == {0, 1}
    assert 'another training is writing' in log_of(runner)


class UnequalImages(ToyImages):
    """Each image is a row and a column larger than the one before."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return dict(sample, inputs=nn.functional.pad(sample['inputs'], (0, index, 0, index)))


class Padding(BaseDataPreprocessor):
    """Pads a list of images alike, as those of mmdet and mmpretrain do."""

    def forward(self, data, training=False):
        inputs = data['inputs']
        inputs = stack_batch(inputs) if isinstance(inputs, list) else inputs
        return dict(inputs=inputs, labels=data['labels'])


def test_memory_that_is_short_later_has_the_advice_too(tmp_path, monkeypatch):
    run = condensation_hook._run

    def short(*arguments):
        if runner.iter:
            raise MemoryError('tried to allocate')
        run(*arguments)

    monkeypatch.setattr(condensation_hook, '_run', short)
    runner = make_runner(tmp_path, hooks=[HOOK], epochs=1)
    with pytest.raises(RuntimeError, match=r'set fixed_samples to fewer images .*: tried to allo'):
        runner.train()


def test_images_of_several_sizes_are_padded_where_the_model_can(tmp_path):
    val = UnequalImages(size=8, seed=1)
    runner = make_runner(tmp_path / 'not', hooks=[HOOK], epochs=1, val=val)
    with pytest.raises(RuntimeError, match=r'set fixed_samples to fewer images .* or to 0'):
        runner.train()

    model = ToyNet()
    model.data_preprocessor = Padding()
    options = dict(epochs=1, val=val, train_dataloader=dict(loader(ToyImages()), batch_size=4))
    runner = make_runner(tmp_path / 'can', model, hooks=[HOOK], **options)
    hook_of(runner, CondensationHook).before_train(runner)
    assert None not in column(table(tmp_path / 'can'), layer='norm', where='fixed/input')


class TwoSets(BaseLoop):
    """Validates on two sets, each with a loader of its own."""

    def __init__(self, runner, dataloader, evaluator):
        self._runner = runner
        self.dataloaders = [runner.build_dataloader(one) for one in dataloader]

    def run(self):
        pass


def test_with_several_validation_sets_the_fixed_batch_is_of_the_training_set(tmp_path):
    LOOPS.register_module(module=TwoSets, force=True)
    options = dict(epochs=1, val=False)
    make_runner(tmp_path / 'none', hooks=[HOOK], **options).train()
    options['val_dataloader'] = [loader(ToyImages(seed=seed)) for seed in (1, 2)]
    options.update(val_cfg=dict(type='TwoSets'), val_evaluator=[Accuracy()])
    make_runner(tmp_path / 'two', hooks=[HOOK], **options).train()
    assert table(tmp_path / 'two') == table(tmp_path / 'none')


class Stream(IterableDataset):
    """Images as they come; mmengine's LoggerHook asks for their number."""

    def __len__(self):
        return 32

    def __iter__(self):
        return iter(ToyImages())


def test_a_stream_of_images_has_no_fixed_batch(tmp_path):
    stream = DataLoader(Stream(), batch_size=8)
    options = dict(iters=4, val=False, train_dataloader=stream)
    line = (
        '^CondensationHook: its fixed batch is drawn by index, and Stream is an IterableDataset; '
        'set fixed_samples=0 to train without one, or validate on a data set with indices$'
    )
    with pytest.raises(ValueError, match=line):
        make_runner(tmp_path / 'fixed', hooks=[HOOK], **options).train()
    make_runner(tmp_path / 'none', hooks=[dict(HOOK, fixed_samples=0)], **options).train()
    assert column(table(tmp_path / 'none'), 'iter', layer='norm', where='train/input') == [4]
    make_runner(tmp_path / 'val', hooks=[HOOK], **{**options, 'val': True}).train()
    assert column(table(tmp_path / 'val'), 'iter', layer='norm', where='fixed/input') == [0, 4]


def test_a_single_image_has_no_similarity(tmp_path):
    make_runner(tmp_path, hooks=[HOOK], epochs=1, val=ToyImages(size=1)).train()
    assert column(table(tmp_path), layer='norm', where='fixed/input') == [None, None]


def test_iteration_based_loop_records_every_val_interval(tmp_path):
    make_runner(tmp_path, hooks=[HOOK], iters=10).train()
    rows = table(tmp_path)
    assert column(rows, 'iter', layer='norm', where='fixed/input') == [0, 4, 8, 10]
    assert column(rows, 'iter', layer='norm', where='train/input') == [4, 8, 10]


def test_resume_between_two_records_keeps_the_averages_begun(tmp_path):
    options = dict(hooks=[HOOK], default_hooks=by_iteration(6))
    make_runner(tmp_path / 'whole', iters=10, **options).train()
    make_runner(tmp_path / 'parts', iters=6, **options).train()
    # The shorter run ended with a record that the longer one has not.
    path = tmp_path / 'parts' / 'iter_6.pth'
    saved = torch.load(path, weights_only=False)
    assert saved['condensation']['state'][:, 0, 1].sum() == 0
    whole = torch.load(tmp_path / 'whole' / 'iter_6.pth', weights_only=False)
    assert whole['condensation']['state'][0, 0, 1] == 2
    torch.save(whole, path)
    lines = (tmp_path / 'parts' / 'condensation.csv').read_text().splitlines()
    kept = [line for line in lines if ',6,' not in line[:4]]
    (tmp_path / 'parts' / 'condensation.csv').write_text('\n'.join(kept) + '\n')

    make_runner(tmp_path / 'parts', iters=10, resume=True, **options).train()
    assert table(tmp_path / 'parts') == table(tmp_path / 'whole')


class Killed(Exception):
    """Ends a training at an iteration."""


class Killer(Hook):
    priority = 'VERY_LOW'

    def __init__(self, iteration):
        self.iteration = iteration

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.iteration:
            raise Killed


def other_training(folder):
    """One that recorded all 4 of 24 iterations, then another every 8, killed at 14."""
    options = dict(iters=24, default_hooks=by_iteration(4))
    make_runner(folder, hooks=[HOOK], **options).train()
    options['val_interval'] = 8
    second = make_runner(folder, hooks=[HOOK, Killer(14)], **options)
    with pytest.raises(Killed):
        second.train()
    return options


def resumed(folder, **options):
    checkpoint = str(folder / 'iter_12.pth')
    runner = make_runner(folder, hooks=[HOOK], load_from=checkpoint, resume=True, **options)
    runner.train()
    return column(table(folder), 'iter', layer='norm', where='fixed/input'), log_of(runner)


def test_a_resumed_training_goes_on_from_its_own_table(tmp_path):
    options = other_training(tmp_path)
    iterations, log = resumed(tmp_path, **options)
    assert iterations == [0, 8, 16, 24]
    assert 'goes on from' not in log
    (first,) = other_tables(tmp_path)
    assert {row['iter'] for row in read_condensation(first)} == {*range(0, 25, 4)}


def test_a_checkpoint_without_a_digest_goes_on_from_the_nearest_table(tmp_path):
    options = other_training(tmp_path)
    path = tmp_path / 'iter_12.pth'
    checkpoint = torch.load(path, weights_only=False)
    del checkpoint['condensation']['table']
    torch.save(checkpoint, path)
    iterations, log = resumed(tmp_path, **options)
    assert iterations == [0, 4, 8, 12, 16, 24]
    assert 'this one goes on from' in log


def test_rows_that_a_crash_took_are_told(tmp_path):
    options = other_training(tmp_path)
    text = (tmp_path / 'condensation.csv').read_bytes()
    (tmp_path / 'condensation.csv').write_bytes(text[:-20] + b'\0' * 20)
    for other in other_tables(tmp_path):
        other.unlink()
    iterations, log = resumed(tmp_path, **options)
    assert iterations == [0, 8, 16, 24]
    assert 'had written by iteration 12: it goes on from' in log


def test_a_checkpoint_of_the_last_iteration_of_an_epoch_knows_its_table(tmp_path):
    """It is written before the record of that epoch is."""
    make_runner(tmp_path, hooks=[HOOK], default_hooks=by_iteration(4)).train()
    checkpoint = str(tmp_path / 'iter_8.pth')
    digest = torch.load(checkpoint, weights_only=False)['condensation']['table']
    opened = CondensationTable(tmp_path, 'again', 8, digest)
    assert {row['iter'] for row in opened.rows} == {0, 4, 8}
    assert opened.notes == []
    opened.close()


def test_gates_in_the_table_and_in_the_log(tmp_path):
    model = ToyNet(fct=0.99, fct_momentum=1.0, fct_warmup=8)
    runner = make_runner(tmp_path, model, hooks=[HOOK], epochs=3, log_level='INFO')
    runner.train()
    rows = table(tmp_path)
    # Two calls a step: the warm-up of eight batches is over after the first epoch.
    used = column(rows, 'batch_statistics_used', layer='norm', where='train/input')
    assert used == [1, 0, 0]
    assert column(rows, 'batch_statistics_used', layer='norm', where='fixed/input') == [None] * 4
    assert column(rows, 'batch_statistics_used', layer='stem.1', where='train/input') == [None] * 3
    last = column(rows, 'running_similarity', layer='norm', where='train/input')[-1]
    assert last == pytest.approx(float(model.norm.running_similarity), rel=1e-5)

    lines = re.findall(r'Condensation at .*', log_of(runner))
    similarities = column(rows, epoch=3, where='fixed/input')
    condensed = sum(s > 0.3 for s in similarities)
    assert lines[3].startswith(f'Condensation at epoch 3: {condensed} of 2 layers condensed')
    assert lines[1].endswith('1 of 1 gates open; opened: none; shut: none')
    assert lines[2].endswith('0 of 1 gates open; opened: none; shut: norm')
    assert lines[3].endswith('0 of 1 gates open; opened: none; shut: none')


def test_gates_are_remembered_over_a_resume(tmp_path):
    for epochs, resume in ((2, False), (3, True)):
        model = ToyNet(fct=0.99, fct_momentum=1.0, fct_warmup=8)
        options = dict(epochs=epochs, resume=resume, log_level='INFO')
        runner = make_runner(tmp_path, model, hooks=[HOOK], **options)
        runner.train()
    # Runs that start in the same second share a log.
    shut = re.findall(r'Condensation at (.*?):.*shut: (.*)', log_of(runner))
    assert shut[-1] == ('epoch 3', 'none')


@pytest.mark.newer_torch('Dynamo does not follow a layer that writes to its buffers')
def test_compiled_training_is_left_alone_and_unseen(tmp_path):
    options = dict(epochs=1, cfg=lambda: dict(compile=dict(backend='eager')))
    runner = assert_same_training(tmp_path, HOOK, **options)
    rows = table(runner.work_dir)
    assert column(rows, layer='stem.1', where='train/input') == [None]
    assert None not in column(rows, layer='stem.1', where='fixed/input')


def test_scalars_are_means_over_groups(plain):
    runner = plain[0]
    lines = (Path(runner.log_dir) / 'vis_data' / 'scalars.json').read_text().splitlines()
    scalars = [json.loads(line) for line in lines if 'condensation/' in line]
    assert [s['step'] for s in scalars] == [0, 4, 8]
    rows = table(runner.work_dir)
    stem, norm = column(rows, epoch=1, where='fixed/input')
    assert scalars[1]['condensation/stem/fixed/input'] == pytest.approx(stem, abs=1e-5)
    assert scalars[1]['condensation/norm/fixed/input'] == pytest.approx(norm, abs=1e-5)
    assert scalars[1]['condensation/all/fixed/input'] == pytest.approx((stem + norm) / 2, abs=1e-5)
    assert scalars[1]['condensation/norm/batch_statistics_used'] == 1


def test_bad_settings():
    with pytest.raises(ValueError, match='interval counts iterations and must be positive, got 0'):
        CondensationHook(interval=0)
    with pytest.raises(ValueError, match='fixed_samples cannot be negative, got -1'):
        CondensationHook(fixed_samples=-1)


def test_resume_refuses_a_foreign_table(copied):
    (copied / 'condensation.csv').write_text('a,b\n1,2\n')
    with pytest.raises(ValueError, match=r'condensation.csv is no condensation table'):
        make_runner(copied, hooks=[HOOK], epochs=3, resume=True).train()


def distributed_net():
    torch.manual_seed(0)
    return MMDistributedDataParallel(ToyNet(), device_ids=None, broadcast_buffers=False)


def train_on_rank(folder, rank, world):
    model = distributed_net()
    seen = spy(model.module)
    make_runner(folder / 'run', model, hooks=[HOOK]).train()
    return dict(seen=seen, mean=model.module.stem[1].running_mean)


def test_two_processes_are_averaged(tmp_path):
    first, second = in_processes(partial(train_on_rank, tmp_path), 2, tmp_path)
    assert not torch.equal(first['mean'], second['mean'])
    rows = table(tmp_path / 'run')
    assert len(rows) == 4 + 2 * 8
    both = [(a + b) / 2 for a, b in zip(first['seen'], second['seen'])]
    expected = [sum(both[:2]) / 2, sum(both[2:]) / 2]
    recorded = column(rows, layer='stem.1', where='train/input')
    assert recorded == pytest.approx(expected, abs=1e-6)
    assert first['seen'] != second['seen']


def resume_on_rank(folder, rank, world):
    options = dict(hooks=[HOOK], iters=8, default_hooks=by_iteration(6))
    make_runner(folder / 'whole', distributed_net(), **options).train()
    options.update(load_from=str(folder / 'whole' / 'iter_6.pth'), resume=True)
    make_runner(folder / 'resumed', distributed_net(), **options).train()


def test_two_processes_resume_between_two_records(tmp_path):
    in_processes(partial(resume_on_rank, tmp_path), 2, tmp_path)
    whole, resumed = table(tmp_path / 'whole'), table(tmp_path / 'resumed')
    assert column(resumed, 'iter', layer='stem.1', where='train/input') == [8]
    for where in ('train/input', 'train/output'):
        for layer in ('stem.1', 'norm'):
            recorded = column(resumed, layer=layer, where=where, iter=8)
            expected = column(whole, layer=layer, where=where, iter=8)
            assert recorded == pytest.approx(expected, abs=1e-5)
    assert column(resumed, 'batch_statistics_used', layer='norm', where='train/input') == [1]

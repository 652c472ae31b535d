"""A resumed run draws the random numbers of the undisturbed one."""

import pytest
import torch
from toy_runner import ToyImages, ToyNet, everything, loader, log_of, make_runner

HOOK = dict(type='EpochSeedHook')


class Draws(ToyImages):
    """Augments by what every global generator draws, and keeps nothing from image to image."""

    def __getitem__(self, index):
        self.cache = torch.zeros(3, 8, 8)
        return super().__getitem__(index)


def train(work_dir, hooks=(HOOK,), workers=2, epochs=4, **options):
    data = loader(Draws(augment=True), shuffle=True)
    data.update(num_workers=workers, persistent_workers=workers > 0)
    torch.manual_seed(0)
    runner = make_runner(
        work_dir, ToyNet(dropout=0.5), hooks, epochs, val=False, train_dataloader=data, **options
    )
    runner.train()
    runner.train_dataloader._iterator = None  # ends the workers; left to gc, that takes long
    return everything(runner)


def same(a, b):
    return all(map(torch.equal, a, b))


@pytest.mark.parametrize('workers', [0, 2])
def test_resumed_run_ends_with_the_same_bits(tmp_path, workers):
    whole = train(tmp_path / 'whole', workers=workers)
    train(tmp_path / 'parts', workers=workers, epochs=2)
    parts = train(tmp_path / 'parts', workers=workers, resume=True)
    assert same(whole, parts)


def test_without_it_the_resumed_run_is_another(tmp_path):
    whole = train(tmp_path / 'whole', hooks=[], workers=0)
    train(tmp_path / 'parts', hooks=[], workers=0, epochs=2)
    assert not same(whole, train(tmp_path / 'parts', hooks=[], workers=0, resume=True))


def test_epochs_draw_differently(tmp_path):
    """With a seed for every epoch alike, epoch and augmentation would repeat each other."""
    seen = []

    class Watched(Draws):
        def __getitem__(self, index):
            item = super().__getitem__(index)
            seen.append((item['inputs'] - self.images[index]).mean().item())
            return item

    data = loader(Watched(augment=True))
    make_runner(tmp_path, None, [HOOK], 2, val=False, train_dataloader=data).train()
    assert len(set(seen)) == 64


def test_a_run_without_a_seed_is_left_as_it_is(tmp_path):
    """With the hook, workers start anew in every epoch."""
    data = loader(Draws(augment=True), shuffle=True)
    data.update(num_workers=1, persistent_workers=True)
    runners = []
    for seed in (None, 0):
        runner = make_runner(
            tmp_path / str(seed),
            None,
            [HOOK],
            2,
            val=False,
            train_dataloader=data,
            seed=seed,
        )
        init = runner.train_dataloader.worker_init_fn
        runner.train()
        runners.append(runner.train_dataloader.worker_init_fn is init)
        runner.train_dataloader._iterator = None
    assert runners == [True, False]


@pytest.mark.parametrize(('batch_size', 'length'), [(8, None), (4, 8), (16, 2)])
def test_epochs_of_another_length_are_told(tmp_path, batch_size, length):
    """As on another number of processes."""

    def log(batch_size, **options):
        data = loader(ToyImages(), batch_size=batch_size)
        runner = make_runner(tmp_path, None, [HOOK], val=False, train_dataloader=data, **options)
        runner.train()
        return log_of(runner)

    begun = log(8, epochs=2)
    resumed = log(batch_size, epochs=4, resume=True)
    told = f'resumed at epoch 2, iteration 8, but an epoch now has {length} iterations'
    assert (told in resumed) == (length is not None)
    assert ('Schedules by iteration' in resumed) == (length is not None)
    assert 'Schedules by iteration' not in begun

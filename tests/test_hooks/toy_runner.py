"""A Runner that trains a small net in a second, real in every part."""

import itertools
import random
from pathlib import Path

import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.runner import Runner
from tool import read_csv
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

import mmubn

HOOK = dict(type='CondensationHook', interval=1)
_numbers = itertools.count()


class ToyNet(BaseModel):
    """Two classes; a batch norm, a UBN that is called twice, and dropout."""

    def __init__(self, dropout=0.0, **ubn):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
        self.layer1 = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.norm = mmubn.UBN(8, **ubn)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(8, 2)

    def forward(self, inputs, labels, mode='tensor'):
        x = self.stem(inputs).relu_()
        for conv in self.layer1:
            x = self.norm(conv(x)).relu_()
        logits = self.fc(self.dropout(x.mean((2, 3))))
        return dict(loss=F.cross_entropy(logits, labels)) if mode == 'loss' else logits


class ToyImages(Dataset):
    """Images that its transform augments from every global generator and from a cache."""

    def __init__(self, size=32, seed=0, augment=False):
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(size) % 2
        self.images = torch.randn(size, 3, 8, 8, generator=generator)
        self.images += self.labels[:, None, None, None]
        self.augment = augment
        self.cache = torch.zeros(3, 8, 8)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = self.images[index].clone()
        if self.augment:
            image += random.random() + np.random.rand() + torch.rand(())  # noqa: NPY002
            image, self.cache = image + 0.1 * self.cache, image
        return dict(inputs=image, labels=self.labels[index])


class Accuracy(BaseMetric):
    """Top-1 in percent."""

    def process(self, data_batch, data_samples):
        logits = torch.stack(list(data_samples))
        self.results += (logits.argmax(1) == data_batch['labels']).tolist()

    def compute_metrics(self, results):
        return {'accuracy/top1': 100 * sum(results) / len(results)}


def loader(dataset, shuffle=False, infinite=False, batch_size=8):
    return dict(
        batch_size=batch_size,
        num_workers=0,
        dataset=dataset,
        sampler=dict(type='InfiniteSampler' if infinite else 'DefaultSampler', shuffle=shuffle),
        collate_fn=dict(type='default_collate'),
    )


def make_runner(
    work_dir,
    model=None,
    hooks=(),
    epochs=2,
    iters=None,
    val_interval=4,
    val=True,
    seed=0,
    **options,
):
    """A Runner on 32 training images, four iterations an epoch; with ``iters`` without epochs."""
    torch.manual_seed(0)
    options.setdefault('log_level', 'WARNING')
    options.setdefault('optim_wrapper', dict(optimizer=dict(type='SGD', lr=0.1, momentum=0.9)))
    options.setdefault(
        'train_dataloader', loader(ToyImages(), shuffle=True, infinite=iters is not None)
    )
    if iters is None:
        options['train_cfg'] = dict(by_epoch=True, max_epochs=epochs)
    else:
        options['train_cfg'] = dict(by_epoch=False, max_iters=iters, val_interval=val_interval)
    if val:
        val_dataloader = loader(ToyImages(size=48, seed=1) if val is True else val)
        options.update(val_dataloader=val_dataloader, val_cfg={}, val_evaluator=[Accuracy()])
    return Runner(
        model=ToyNet() if model is None else model,
        work_dir=str(work_dir),
        custom_hooks=list(hooks),
        randomness=dict(seed=seed),
        # mmengine shares loggers and visualizers between experiments of one name.
        experiment_name=f'toy{next(_numbers)}',
        **options,
    )


def hook_of(runner, kind):
    """The hook of a class."""
    (hook,) = (hook for hook in runner.hooks if isinstance(hook, kind))
    return hook


def everything(runner):
    """Weights, buffers and momenta."""
    momenta = runner.optim_wrapper.optimizer.state_dict()['state'].values()
    return [*runner.model.state_dict().values(), *(m['momentum_buffer'] for m in momenta)]


def assert_same_training(work_dir, hook, **options):
    """Trains with and without the hook and returns the Runner with; options may be functions."""
    runners = []
    for name, hooks in (('without', []), ('with', [hook])):
        torch.manual_seed(0)
        chosen = {key: make() if callable(make) else make for key, make in options.items()}
        hooks = [*chosen.pop('hooks', []), *hooks]
        runner = make_runner(work_dir / name, hooks=hooks, **chosen)
        runner.train()
        runners.append(runner)
    without, with_hook = map(everything, runners)
    assert len(without) == len(with_hook)
    assert all(map(torch.equal, without, with_hook))
    return runners[1]


def log_of(runner):
    """The text of the run's log file."""
    return next(Path(runner.log_dir).glob('*.log')).read_text()


def table(work_dir):
    """The rows that the condensation hook wrote."""
    return read_csv(Path(work_dir) / 'condensation.csv')


def column(rows, name='similarity', **where):
    """The numbers of a column, of the rows that are as ``where`` says."""
    chosen = [r for r in rows if all(r[k] == str(v) for k, v in where.items())]
    return [float(r[name]) if r[name] else None for r in chosen]

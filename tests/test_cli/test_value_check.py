"""Numbers and names that mmengine or torch would refuse after the work directory is made."""

import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import DefaultSampler
from mmengine.registry import DATASETS
from told import told
from torch import nn

from mmubn.cli.errors import CommandError
from mmubn.cli.value_check import check_training, check_values

SOUND = dict(
    train_dataloader=dict(batch_size=2, num_workers=2, persistent_workers=True),
    val_dataloader=dict(num_workers=0, persistent_workers=False, prefetch_factor=None),
    train_cfg=dict(max_epochs=1, val_interval=1),
    optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1, weight_decay=0)),
    auto_scale_lr=dict(enable=True, base_batch_size=16),
)


def check(**changes) -> None:
    cfg = Config(SOUND)
    cfg.merge_from_dict(changes)
    check_values(cfg, nn.Module())
    check_training(cfg, nn.Module())


def test_sound_values():
    check()
    check(log_level=10, load_from=None)
    for seed in (0, 2**32 - 1, None):
        check(**{'randomness.seed': seed})
    for counts in (1, 4, 4.0):
        check(**{'optim_wrapper.accumulative_counts': counts})
    check(log_level='DEBUG', load_from='a.pth')
    for key in ('max_epochs', 'max_iters', 'val_interval'):  # the loops take 90e3
        check(**{f'train_cfg.{key}': 90e3})


@pytest.mark.parametrize(
    ('key', 'value', 'reason'),
    [
        ('train_dataloader.batch_size', 0, 'must be an integer from 1 on, got 0'),
        ('train_dataloader.batch_size', 2.0, 'must be an integer from 1 on, got 2.0'),
        ('val_dataloader.num_workers', -1, 'must be an integer from 0 on, got -1'),
        (
            'train_dataloader.num_workers',
            0,
            '=0: persistent_workers=True needs workers; give --cfg-options '
            'train_dataloader.persistent_workers=False too',
        ),
        ('train_cfg.max_epochs', 0, 'must be an integer from 1 on, got 0'),
        ('train_cfg.max_epochs', '12', "must be an integer from 1 on, got '12'"),
        ('train_cfg.val_interval', 0.5, 'must be an integer from 1 on, got 0.5'),
        ('randomness.seed', -1, 'must be an integer from 0 on, got -1'),
        ('randomness.seed', 1.5, 'must be an integer from 0 on, got 1.5'),
        ('randomness.seed', 2**32, 'must be below 2**32, got 4294967296'),
        ('optim_wrapper.accumulative_counts', 0, 'must be an integer from 1 on, got 0'),
        ('optim_wrapper.accumulative_counts', 1.5, 'must be an integer from 1 on, got 1.5'),
        ('log_level', 'LOUD', "there is no level 'LOUD'; take DEBUG, INFO"),
        ('load_from', '', 'names no file; write None'),
        (
            'optim_wrapper.optimizer.lr',
            [0, 1],
            'optim_wrapper.optimizer.lr: must be a number from 0 on, got [0, 1]; write decimals',
        ),
        ('optim_wrapper.optimizer.lr', float('nan'), 'must be a number from 0 on, got nan'),
        ('optim_wrapper.optimizer.momentum', True, 'must be a number from 0 on, got True'),
        ('optim_wrapper.optimizer.weight_decay', -1e-4, 'a number from 0 on, got -0.0001'),
        ('auto_scale_lr.base_batch_size', None, 'the config has no auto_scale_lr.base_batch_size'),
    ],
)
def test_error_names_the_key(key, value, reason):
    line = told(check, **{key: value})
    assert line.startswith(key.split('.')[0])
    assert reason in line


def test_sound_indices():
    pytest.importorskip('mmpretrain')
    for indices in (5, -5, [0, 2], (1,), None):
        dataset = dict(type='mmpretrain.CustomDataset', indices=indices)
        check(**{'train_dataloader.dataset': dataset})
    check(**{'train_dataloader.dataset': dict(type='SomebodysOwn', indices=0)})


@pytest.mark.parametrize('value', [0, [], 2.0, '2', [0.5], ['a']])
@pytest.mark.parametrize('serialize_data', [True, False])
def test_indices_that_no_dataset_takes(tmp_path, value, serialize_data):
    pytest.importorskip('mmpretrain')
    (tmp_path / 'a').mkdir()
    (tmp_path / 'a' / '0.png').touch()
    dataset = dict(
        type='mmpretrain.CustomDataset',
        data_root=str(tmp_path),
        indices=value,
        serialize_data=serialize_data,
    )
    with pytest.raises((TypeError, ValueError, ZeroDivisionError)):
        list(DefaultSampler(DATASETS.build(dataset), shuffle=True, seed=0))
    joined = dict(type='ConcatDataset', datasets=[dataset])
    for place, node in (('', dataset), ('.datasets.0', joined)):
        line = told(check, **{'train_dataloader.dataset': node})
        assert line == (
            f'train_dataloader.dataset{place}.indices: must be how many images are taken, of the '
            f'last ones a negative number, or a list of their numbers, got {value!r}; leave it out '
            'to take all'
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_mixed_precision_needs_a_gpu():
    with pytest.raises(CommandError, match=r'^optim_wrapper\.type=AmpOptimWrapper needs a GPU'):
        check(**{'optim_wrapper.type': 'AmpOptimWrapper'})

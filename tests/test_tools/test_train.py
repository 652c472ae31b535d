"""tools/train.py and what follows from it: resuming, testing, several processes."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from holder import held
from tool import ROOT, run_tool

from mmubn.cli.work_dir_lock import LOCK

DATA = ('tiny.py', '--data-root', 'images')


def weights(path: Path) -> dict:
    return torch.load(path, map_location='cpu', weights_only=False)['state_dict']


def test_trains_tests_and_resumes(project, capsys):
    run_tool('train', *DATA)
    first = weights(project / 'work_dirs' / 'tiny' / 'epoch_1.pth')
    assert first['backbone.layer4.1.bn2.num_batches_tracked'] == 2
    log = next(Path('work_dirs/tiny').glob('*/*.log')).read_text()
    assert 'UBN: 20 layers built, 20 train' in log

    run_tool('train', *DATA, '--resume', '--cfg-options', 'train_cfg.max_epochs=2')
    second = weights(project / 'work_dirs' / 'tiny' / 'epoch_2.pth')
    assert second['backbone.layer4.1.bn2.num_batches_tracked'] == 4
    assert not torch.equal(first['head.fc.weight'], second['head.fc.weight'])

    checkpoint = 'work_dirs/tiny/epoch_2.pth'
    argv = ['tiny.py', checkpoint, '--data-root', 'images', '--work-dir', 'tested']
    run_tool('test', *argv, '--out', 'predictions.pkl', '--show-dir', 'drawn')
    predictions = pickle.loads((project / 'predictions.pkl').read_bytes())
    assert [sample['gt_label'].item() for sample in predictions] == [0] * 4 + [1] * 4
    assert len(list((project / 'drawn').glob('*.png'))) == 8
    run_tool('test', *argv, '--out', 'metrics.json', '--out-item', 'metrics')
    right = sum(bool(s['pred_label'] == s['gt_label']) for s in predictions)
    metrics = json.loads((project / 'metrics.json').read_text())
    assert metrics['accuracy/top1'] == pytest.approx(100 * right / 8)


def test_a_second_training_in_the_same_folder_is_refused(project, fails):
    with held('run') as (process, _):
        line = fails('train', *DATA, '--work-dir', 'run')
    assert line.startswith(f'error: work_dir: process {process.pid} on ')
    assert os.listdir('run') == [LOCK]


def test_evaluates_on_train(project, capsys):
    (project / 'images' / 'val').rename(project / 'images' / 'other')
    run_tool('train', *DATA, '--eval-on-train', '--work-dir', 'run')
    line = 'warning: evaluating on the training images (--eval-on-train)'
    assert line in capsys.readouterr().err.splitlines()
    assert 'accuracy/top1' in next(Path('run').glob('*/vis_data/scalars.json')).read_text()


def shell(script: str, *argv: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']])
    env = {**os.environ, 'PATH': path, 'CUDA_VISIBLE_DEVICES': ''}
    for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'PORT', 'NNODES'):
        env.pop(name, None)
    command = [str(ROOT / 'tools' / script), *argv]
    return subprocess.run(command, capture_output=True, text=True, env=env)


@pytest.mark.slow
def test_two_processes_without_gpu(project):
    done = shell('dist_train.sh', 'tiny.py', '2', *DATA[1:], '--work-dir', 'two')
    assert done.returncode == 0, done.stderr[-3000:]
    # 8 images, 4 for each process at once.
    assert weights(project / 'two' / 'epoch_1.pth')['backbone.bn1.num_batches_tracked'] == 1

    done = shell('dist_test.sh', 'tiny.py', 'two/epoch_1.pth', '2', *DATA[1:], '--out', 'two.pkl')
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(pickle.loads((project / 'two.pkl').read_bytes())) == 8


@pytest.mark.slow
def test_two_processes_tell_bad_input_once(project):
    done = shell('dist_train.sh', 'tiny.py', '2')
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
    assert len(lines) == 1
    assert lines[0].startswith('error: train_dataloader.dataset.data_root: no folder no/such/place')
    assert not Path('work_dirs').exists()

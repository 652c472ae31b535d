"""What happens to long trainings: killed, cut short, no room, NaN, a process that dies."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import torch
from tiny_project import make_project
from tool import ROOT, run_tool

DATA = ('tiny.py', '--data-root', 'images', '--work-dir', 'run')


def train(*argv, epochs=3):
    run_tool('train', *DATA, *argv, '--cfg-options', f'train_cfg.max_epochs={epochs}')


def end(work_dir='run', name='epoch_3.pth') -> dict:
    """Everything that a checkpoint holds of model and optimizer, by name."""
    checkpoint = torch.load(Path(work_dir) / name, map_location='cpu', weights_only=False)
    momenta = checkpoint['optimizer']['state']
    optimizer = {f'{p} {k}': v for p in momenta for k, v in momenta[p].items()}
    return {**checkpoint['state_dict'], **optimizer}


def same(a: dict, b: dict) -> bool:
    pairs = [(a[key], b[key]) for key in a]
    return a.keys() == b.keys() and all(
        x is y or torch.equal(torch.as_tensor(x), torch.as_tensor(y)) for x, y in pairs
    )


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.fixture(scope='module')
def finished(tmp_path_factory) -> Path:
    """The tiny project after three epochs in ``run``."""
    folder = tmp_path_factory.mktemp('finished')
    make_project(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train()
    return folder


@pytest.fixture
def trained(project, finished) -> Path:
    """A copy of it, which is the working directory."""
    shutil.copytree(finished / 'run', 'run')
    Path('run/last_checkpoint').write_text(str(project / 'run' / 'epoch_3.pth'))
    return project


def test_a_checkpoint_cut_short_is_reported_and_the_one_before_it_used(trained, capsys):
    expected = end()
    cut_short(trained / 'run' / 'epoch_3.pth')
    time_of_two = (trained / 'run' / 'epoch_2.pth').stat().st_mtime
    os.utime(trained / 'run' / 'epoch_1.pth', (time_of_two - 9, time_of_two - 9))
    torch.save({}, 'run/weights.pth')  # newer, but no checkpoint
    train('--resume')
    (line,) = [ln for ln in capsys.readouterr().err.splitlines() if ln.startswith('warning: --res')]
    assert line.startswith('warning: --resume: run/epoch_3.pth is not a whole checkpoint (')
    assert line.endswith('): resuming from run/epoch_2.pth')
    assert same(end(), expected)


def test_a_checkpoint_that_is_gone(trained, capsys):
    """Killed between the removal of the old checkpoint and the end of the new one."""
    expected = end()
    (trained / 'run' / 'epoch_3.pth').unlink()
    cut_short(trained / 'run' / 'epoch_1.pth')
    train('--resume')
    assert 'resuming from run/epoch_2.pth' in capsys.readouterr().err
    assert same(end(), expected)


def test_a_work_dir_that_was_copied(trained, capsys):
    """Its note names a checkpoint of the original, which has gone on."""
    expected = end()
    (trained / 'run' / 'epoch_3.pth').unlink()
    (trained / 'run' / 'last_checkpoint').write_text(str(trained / 'run' / 'epoch_2.pth'))
    shutil.copytree('run', 'moved')
    cut_short(trained / 'run' / 'epoch_2.pth')
    run_tool('train', *DATA[:4], 'moved', '--resume', '--cfg-options', 'train_cfg.max_epochs=3')
    assert 'warning' not in capsys.readouterr().err
    assert same(end('moved'), expected)


def test_no_whole_checkpoint_is_one_line(trained, capsys):
    for path in (trained / 'run').glob('*.pth'):
        cut_short(path)
    with pytest.raises(SystemExit):
        train('--resume')
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith('; no checkpoint in run is whole: start anew')


def test_a_note_cut_short_without_checkpoints_is_one_line(trained, fails):
    for path in (trained / 'run').glob('*.pth'):
        path.unlink()
    (trained / 'run' / 'last_checkpoint').write_text('')
    line = fails('train', *DATA, '--resume')
    assert line.startswith(
        'error: --resume: run/last_checkpoint names no checkpoint; no checkpoint'
    )


def test_killed_in_its_first_checkpoint_it_starts_anew(trained, capsys):
    expected = end()
    for name in ('epoch_2.pth', 'epoch_3.pth', 'last_checkpoint'):
        (trained / 'run' / name).unlink()
    cut_short(trained / 'run' / 'epoch_1.pth')
    train('--resume')
    assert 'epoch_1.pth is not a whole checkpoint' in capsys.readouterr().err
    assert same(end(), expected)


def test_with_nothing_to_resume_it_starts_from_load_from(trained):
    """``reproduce.py`` always resumes, also where its rows start from other weights."""
    options = ('--cfg-options', 'load_from=run/epoch_3.pth', 'optim_wrapper.optimizer.lr=0.0')
    run_tool('train', *DATA[:4], 'fine', '--resume', *options)
    key = 'head.fc.weight'
    assert torch.equal(end('fine', 'epoch_1.pth')[key], end()[key])
    log = next(Path('fine').glob('*/vis_data/config.py')).read_text()
    assert 'resume = False' in log.splitlines()

    # Its own checkpoint wins over load_from.
    own = torch.load('fine/epoch_1.pth', map_location='cpu', weights_only=False)
    own['state_dict'][key].fill_(0.5)
    torch.save(own, 'fine/epoch_1.pth')
    run_tool('train', *DATA[:4], 'fine', '--resume', *options, 'train_cfg.max_epochs=2')
    assert end('fine', 'epoch_2.pth')[key].eq(0.5).all()
    assert not Path('fine/epoch_3.pth').exists()


def test_the_seed_of_a_run_without_one_is_resumed(project):
    config = project / 'tiny.py'
    config.write_text(config.read_text().replace('seed=0', 'seed=None'))
    train()
    expected = end()
    (project / 'run' / 'epoch_3.pth').unlink()
    (project / 'run' / 'last_checkpoint').write_text('run/epoch_2.pth')
    train('--resume')
    assert same(end(), expected)


def test_no_room_for_a_checkpoint(project, fails):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        line = fails('train', *DATA)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert line == (
        f'error: work_dir: no room in {project} for a checkpoint of 0.7 MB (File too large); '
        'give another folder by --work-dir'
    )
    assert sorted(path.name for path in project.iterdir()) == ['images', 'tiny.py']


def test_nan_stops_unless_the_config_skips(project, capsys):
    option = ('--cfg-options', 'optim_wrapper.optimizer.lr=1e30', 'train_cfg.max_epochs=3')
    with pytest.raises(FloatingPointError, match=r'the first layer with such output is backbone\.'):
        run_tool('train', *DATA, *option)
    config = project / 'tiny.py'
    hook = "custom_hooks = [dict(type='NonFiniteHook', action='skip', max_skips=99)]\n"
    config.write_text(config.read_text() + hook)
    run_tool('train', *DATA, *option)
    log = max(Path('run').glob('*/*.log')).read_text()
    assert log.count('Skipped this step.') == 5  # of 6: the first made the weights what they are


# --- Several processes.

DYING = """
import os, signal
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module()
class Dying(Hook):
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == 2 and get_rank() == 1:
            if 'HOW' in os.environ:
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError('this rank has had enough')
"""


def processes_with(mark: str) -> list:
    """Those that inherited a mark in their environment."""
    found = []
    for process in Path('/proc').glob('[0-9]*'):
        try:
            if mark.encode() in (process / 'environ').read_bytes():
                found.append((process / 'cmdline').read_bytes())
        except OSError:
            continue
    return found


@pytest.mark.slow
@pytest.mark.parametrize('how', ['raises', 'killed'])
def test_one_process_dying_ends_the_job(project, how):
    (project / 'dying.py').write_text(DYING)
    config = project / 'tiny.py'
    config.write_text(
        config.read_text()
        + "custom_imports = dict(imports=['mmubn', 'dying'])\n"
        + "custom_hooks = [dict(type='Dying'), *_base_.custom_hooks]\n"
    )
    mark = f'MARK={uuid.uuid4()}'
    env = {**os.environ, 'PYTHON': sys.executable, 'PYTHONPATH': str(project), 'MARK': mark[5:]}
    if how == 'killed':
        env['HOW'] = how
    command = [str(ROOT / 'tools' / 'dist_train.sh'), 'tiny.py', '2', *DATA[1:], '--cfg-options']
    command += ['train_cfg.max_epochs=9', 'train_dataloader.num_workers=1']
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=200)
    assert done.returncode == 1
    expected = 'ValueError: this rank has had enough' if how == 'raises' else 'Signal 9 (SIGKILL)'
    summary = done.stderr[done.stderr.index('Root Cause') :]
    assert expected in summary
    assert 'rank      : 1 ' in summary
    deadline = time.monotonic() + 20  # workers look for their parent every five seconds
    while processes_with(mark) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert processes_with(mark) == []


# --- The demo.

DEMO = ROOT / 'configs' / 'demo' / 'mask_rcnn_r18_ubn_scenes.py'


@pytest.fixture
def scenes(tmp_path, monkeypatch) -> Path:
    """A handful of the demo's images, beside the working directory."""
    pytest.importorskip('mmdet')
    from mmubn.datasets.scenes import make_scenes

    monkeypatch.chdir(tmp_path)
    make_scenes('scenes', num_train=24, num_val=6, size=128, seed=0)
    return tmp_path


def demo(work_dir: str, *argv: str) -> list:
    """A command that trains three epochs of six iterations."""
    options = ['train_cfg.max_epochs=3', 'train_cfg.val_interval=3']
    options += ['default_hooks.logger.interval=1', 'default_hooks.checkpoint.max_keep_ckpts=2']
    script = [sys.executable, str(ROOT / 'tools' / 'train.py'), str(DEMO)]
    return [
        *script,
        '--data-root',
        'scenes',
        '--work-dir',
        work_dir,
        *argv,
        '--cfg-options',
        *options,
    ]


@pytest.mark.slow
def test_killed_in_mid_epoch_and_resumed_the_demo_ends_with_the_same_bits(scenes):
    subprocess.run(demo('whole'), check=True, capture_output=True)
    with subprocess.Popen(demo('killed'), stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as run:
        for line in run.stdout:
            if b'Epoch(train) [2][4/6]' in line:
                run.send_signal(signal.SIGKILL)
                break
        else:
            pytest.fail('the training ended before it was killed')
    assert run.returncode == -signal.SIGKILL
    assert (scenes / 'killed' / 'last_checkpoint').read_text().endswith('epoch_1.pth')
    subprocess.run(demo('killed', '--resume'), check=True, capture_output=True)
    assert same(end('killed'), end('whole'))
    assert 'backbone.bn1.running_similarity' in end('whole')
    tables = [(scenes / run / 'condensation.csv').read_text() for run in ('killed', 'whole')]
    assert tables[0] == tables[1]


@pytest.mark.slow
def test_four_processes_on_few_cores_finish_the_demo(scenes):
    env = {**os.environ, 'PYTHON': sys.executable}
    command = [str(ROOT / 'tools' / 'dist_train.sh'), str(DEMO), '4', *demo('four')[3:]]
    command.append('model.backbone.norm_cfg.type=SyncUBN')
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert end('four')['backbone.bn1.num_batches_tracked'] == 6  # 24 images, 16 at once


@pytest.mark.slow
def test_two_processes_train_the_demo_to_the_ap_of_one(tmp_path, monkeypatch):
    """At full length: a quarter of an hour on two cores, or more."""
    pytest.importorskip('mmdet')
    from mmubn.datasets.scenes import make_scenes

    monkeypatch.chdir(tmp_path)
    make_scenes('scenes')
    env = {**os.environ, 'PYTHON': sys.executable}
    command = [str(ROOT / 'tools' / 'dist_train.sh'), str(DEMO), '2', '--data-root', 'scenes']
    command += ['--work-dir', 'two', '--cfg-options', 'train_dataloader.batch_size=2']
    command.append('model.backbone.norm_cfg.type=SyncUBN')
    subprocess.run(command, env=env, check=True, capture_output=True)
    last = [json.loads(line) for line in next(Path('two').glob('*/vis_data/scalars.json')).open()][
        -1
    ]
    # Those of one process that the README gives.
    assert last['coco/bbox_mAP'] == pytest.approx(0.576, abs=0.05)
    assert last['coco/segm_mAP'] == pytest.approx(0.614, abs=0.05)

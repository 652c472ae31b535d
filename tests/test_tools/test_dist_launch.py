"""The launch scripts, by a python or srun that tells its arguments."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from tiny_project import ROOT

SCRIPTS = ('dist_launch.sh', 'dist_test.sh', 'dist_train.sh')


def launched(folder: Path, script: str, *argv: str, **variables: str) -> list:
    tools = folder / 'the tools'
    tools.mkdir(exist_ok=True)
    for name in SCRIPTS:
        shutil.copy(ROOT / 'tools' / name, tools)
    python = folder / 'a python'
    python.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$PYTHONPATH" "$@"\n')
    python.chmod(0o755)
    env = {k: v for k, v in os.environ.items() if k not in ('NNODES', 'PORT', 'PYTHONPATH')}
    env.update(PYTHON=str(python), **variables)
    command = [f'{tools.name}/{script}', *argv]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True, cwd=folder)
    path, *arguments = done.stdout.splitlines()
    assert path == f'{tools}/..'
    return arguments


def test_train_with_spaces_in_paths(tmp_path):
    argv = ('my config.py', '2', '--work-dir', 'my run', '--cfg-options', 'a=1')
    assert launched(tmp_path, 'dist_train.sh', *argv) == [
        *('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2'),
        *(f'{tmp_path}/the tools/train.py', 'my config.py', '--launcher', 'pytorch'),
        *('--work-dir', 'my run', '--cfg-options', 'a=1'),
    ]


def test_a_shell_that_looks_for_folders_elsewhere(tmp_path):
    plain = launched(tmp_path, 'dist_train.sh', 'config.py', '2')
    assert launched(tmp_path, 'dist_train.sh', 'config.py', '2', CDPATH='.') == plain


def test_test_on_two_machines(tmp_path):
    argv = ('my config.py', 'the weights.pth', '8')
    variables = dict(NNODES='2', NODE_RANK='1', MASTER_ADDR='10.0.0.1')
    assert launched(tmp_path, 'dist_test.sh', *argv, **variables) == [
        *('-m', 'torch.distributed.run', '--nnodes=2', '--node_rank=1'),
        *('--master_addr=10.0.0.1', '--master_port=29500', '--nproc_per_node=8'),
        *(f'{tmp_path}/the tools/test.py', 'my config.py', 'the weights.pth'),
        *('--launcher', 'pytorch'),
    ]


def test_slurm(tmp_path):
    srun = tmp_path / 'srun'
    srun.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$PYTHONPATH" "$@"\n')
    srun.chmod(0o755)
    env = {k: v for k, v in os.environ.items() if k not in ('GPUS_PER_NODE', 'PYTHONPATH')}
    env['PATH'] = f'{tmp_path}{os.pathsep}{env["PATH"]}'
    env.update(GPUS='16', SRUN_ARGS='--time=1:00 --exclusive', PYTHON='my python')
    command = [str(ROOT / 'tools' / 'slurm_train.sh'), 'gpu', 'ubn', 'my config.py', 'my run']
    command += ['--resume', '--amp']
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    assert done.stdout.splitlines() == [
        f'{ROOT}/tools/..',
        *('--partition=gpu', '--job-name=ubn', '--gres=gpu:8', '--ntasks=16'),
        *('--ntasks-per-node=8', '--cpus-per-task=5', '--kill-on-bad-exit=1'),
        *('--time=1:00', '--exclusive', 'my python', '-u', f'{ROOT}/tools/train.py'),
        *('my config.py', '--work-dir', 'my run', '--launcher', 'slurm', '--resume', '--amp'),
    ]


@pytest.mark.parametrize('script', [*SCRIPTS[1:], 'slurm_train.sh'])
def test_usage(script):
    done = subprocess.run([ROOT / 'tools' / script, 'x.py'], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith('usage: ')


@pytest.mark.parametrize('count', ['0', '-1', 'two', '', '--work-dir'])
@pytest.mark.parametrize('argv', [('dist_train.sh', 'x.py'), ('dist_test.sh', 'x.py', 'x.pth')])
def test_a_number_of_gpus_that_is_none(argv, count):
    script, *others = argv
    command = [ROOT / 'tools' / script, *others, count, 'run']
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"error: GPUS must be a number from 1 on, got '{count}'\n"

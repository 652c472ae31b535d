"""One training at a time writes to a work directory."""

import fcntl
import os

import pytest
from holder import held
from told import told

from mmubn.cli.work_dir_lock import locked


def enter(work_dir):
    with locked(work_dir):
        pass


def test_tells_which_process_trains_there(tmp_path):
    work_dir = tmp_path / 'new' / 'run'
    with held(work_dir) as (process, _):
        line = told(enter, work_dir)
    assert line.startswith(f'work_dir: process {process.pid} on ')
    assert f' writes to {work_dir}; ' in line


def test_a_killed_training_holds_nothing_while_its_workers_live(tmp_path):
    with held(tmp_path) as (process, worker):
        process.kill()
        process.join()
        os.kill(worker, 0)  # it lives
        enter(tmp_path)


def test_the_next_training_may_enter(tmp_path):
    for _ in range(2):
        enter(tmp_path)
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        raise ZeroDivisionError
    with held(tmp_path):
        pass
    enter(tmp_path)


def test_a_lock_that_cannot_be_written(tmp_path):
    (tmp_path / '.lock').mkdir()  # root may write to the lock of another user
    line = told(enter, tmp_path)
    assert line == f'work_dir: cannot write to {tmp_path}/.lock (Is a directory)'


def test_a_file_system_without_locks_is_not_guarded(tmp_path, monkeypatch):
    def lockf(*_):
        raise OSError(37, 'No locks available')

    monkeypatch.setattr(fcntl, 'lockf', lockf)
    with held(tmp_path):
        enter(tmp_path)

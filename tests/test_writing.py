"""Outputs that cannot be written are told in one line, and nothing is left behind."""

import errno
import os

import pytest

from mmubn.cli.errors import CommandError
from mmubn.writing import check_file, check_folder, write_csv


def test_sound_places_stay_as_they_are(tmp_path):
    (tmp_path / 'old.csv').write_text('a,b\n')
    check_file('--csv', tmp_path / 'old.csv')
    check_file('--csv', tmp_path / 'new' / 'new.csv')
    check_folder('--out', tmp_path / 'new' / 'newer')
    assert [path.name for path in tmp_path.iterdir()] == ['old.csv']
    assert (tmp_path / 'old.csv').read_text() == 'a,b\n'


def test_error_names_the_option_and_the_place(tmp_path):
    file = tmp_path / 'file'
    file.touch()
    line = f'--x: cannot write to {file} (Not a directory); name another place'
    for check in (check_file, check_folder):
        with pytest.raises(CommandError) as caught:
            check('--x', file / 'x')
        assert str(caught.value) == line
    with pytest.raises(CommandError, match=r'^--x: .* is a folder; name a file'):
        check_file('--x', tmp_path)


def test_a_full_disk(tmp_path, monkeypatch):
    """What is no checkpoint is not called one."""

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr('os.posix_fallocate', full)
    for size, needed in ((1, ''), (5_700_000, ' for a checkpoint of 5.7 MB')):
        with pytest.raises(CommandError) as caught:
            check_folder('--out', tmp_path, size)
        reason = 'No space left on device'
        assert str(caught.value) == (
            f'--out: no room in {tmp_path}{needed} ({reason}); name another place'
        )


def test_system_that_reserves_no_room(tmp_path, monkeypatch):
    """macOS: nothing tells before the work whether a checkpoint has room; the rest is checked."""
    monkeypatch.delattr('os.posix_fallocate')
    check_folder('--out', tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / 'file').touch()
    with pytest.raises(CommandError, match='cannot write'):
        check_folder('--out', tmp_path / 'file' / 'x')


def test_a_table_is_written_with_its_folder(tmp_path):
    path = tmp_path / 'new' / 'table.csv'
    write_csv(path, ('layer', 'value'), [('größe, 1', 0.1), ('b', None)])
    assert path.read_bytes() == 'layer,value\n"größe, 1",0.1\nb,\n'.encode()

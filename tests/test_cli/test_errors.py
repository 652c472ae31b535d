"""Which process tells an error, and how what other code raises is told."""

from urllib.error import HTTPError, URLError

import pytest
from told import told

from mmubn.cli import errors
from mmubn.cli.errors import CommandError, command, user_error


@command
def fail(argv=None) -> None:
    raise CommandError('key: a reason')


@pytest.mark.parametrize(
    ('environment', 'speaks'),
    [
        ({}, True),
        (dict(RANK='0', LOCAL_RANK='0'), True),
        (dict(RANK='1', LOCAL_RANK='1'), False),
        (dict(RANK='8', LOCAL_RANK='0'), True),  # another machine, which may lack something
        (dict(SLURM_PROCID='1', SLURM_LOCALID='1'), False),
        (dict(SLURM_PROCID='8', SLURM_LOCALID='0'), True),
        (dict(RANK='1', LOCAL_RANK='1', SLURM_PROCID='0', SLURM_LOCALID='0'), False),
    ],
)
def test_the_first_process_of_each_machine_speaks(monkeypatch, capsys, environment, speaks):
    """The others end after it: launchers end all processes with the first that fails."""
    names = ('RANK', 'LOCAL_RANK', 'SLURM_PROCID', 'SLURM_LOCALID', 'TORCHELASTIC_ERROR_FILE')
    for name in names:
        monkeypatch.delenv(name, raising=False)
    waited = []
    monkeypatch.setattr(errors.time, 'sleep', waited.append)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        fail()
    assert ended.value.code == 1
    assert capsys.readouterr().err == ('error: key: a reason\n' if speaks else '')
    assert waited == ([] if speaks else [60])


@pytest.mark.parametrize('error', [URLError('no route'), HTTPError('url', 404, 'gone', None, None)])
def test_a_failed_download_is_one_line(error, capsys):
    @command
    def main(argv=None) -> None:
        raise error

    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err == f'error: {errors._DOWNLOAD}: {error}\n'


@pytest.mark.parametrize(
    ('place', 'said'), [('model', 'model: no such key: a'), ('', 'no such key: a')]
)
def test_a_fault_of_the_user_is_one_line_with_its_place(place, said):
    def fails(error):
        with user_error(KeyError, of=place):
            raise error

    assert told(fails, KeyError('no such key:\n  a')) == said
    with pytest.raises(RuntimeError, match='ours'):
        fails(RuntimeError('ours'))

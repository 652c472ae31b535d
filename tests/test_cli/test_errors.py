"""Which process tells an error."""

import pytest

from mmubn.cli.errors import CommandError, command


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
        (dict(SLURM_PROCID='1'), False),
    ],
)
def test_the_first_process_of_each_machine_speaks(monkeypatch, capsys, environment, speaks):
    for name in ('RANK', 'LOCAL_RANK', 'SLURM_PROCID', 'TORCHELASTIC_ERROR_FILE'):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        fail()
    assert ended.value.code == 1
    assert capsys.readouterr().err == ('error: key: a reason\n' if speaks else '')

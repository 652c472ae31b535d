"""tools/reproduce.py on real trainings: it skips, resumes, refuses and goes on."""

import json
import subprocess
import sys

import pytest
from tool import run_tool

from mmubn.reproduce.logs import read_run
from mmubn.runs import read_condensation

pytestmark = pytest.mark.usefixtures('metafiles_read_once')
TINY = ('table3', '--config', 'tiny.py', '--work-dir', 'runs', '--rows', 'BN', 'UBN')
ONE = ('--seeds', '1', '--epochs', '1')
FCT = 'model.backbone.norm_cfg.fct'


def run(*argv):
    run_tool('reproduce', 'run', *TINY, '--data-root', 'images', '--seeds', '1', *argv)


def states(project) -> dict:
    found = sorted((project / 'runs').glob('*/seed*'))
    return {f.parent.name: read_run(f).state for f in found}


@pytest.mark.slow
def test_runs_skip_resume_and_refuse_another_length(project, capfd):
    run('--epochs', '2', '--rows', 'UBN')
    assert states(project) == {'tiny-UBN': 'done'}
    folder = project / 'runs' / 'tiny-UBN' / 'seed0'
    assert read_run(folder).epoch == 2

    # As if it had been killed in its second epoch.
    (folder / 'epoch_2.pth').unlink()
    (folder / 'last_checkpoint').write_text(str(folder / 'epoch_1.pth'))
    (log,) = folder.glob('*/vis_data/scalars.json')
    log.write_text(''.join(log.read_text().partition('"step": 1}\n')[:2]))
    assert states(project) == {'tiny-UBN': 'part'}
    run('--epochs', '2', '--jobs', '2')
    assert states(project) == {'tiny-BN': 'done', 'tiny-UBN': 'done'}
    assert 'resumed epoch: 1' in (folder / 'output.log').read_text()
    assert (
        '| UBN | top1 | 78.67 | +1.65 | 79.9 |'
        in (project / 'runs' / 'report' / 'report.md').read_text()
    )

    # Beside the config's own hooks, condensation is recorded; a report draws it.
    assert {row['epoch'] for row in read_condensation(folder)} == {0, 1, 2}
    run_tool('reproduce', 'report', 'figure2', *TINY[1:5], '--out', 'out')
    assert (project / 'out' / 'figure2_condensation.png').is_file()

    capfd.readouterr()
    checkpoint = (folder / 'epoch_2.pth').stat().st_mtime_ns
    run('--epochs', '2')
    assert '2 of 2 runs are finished' in capfd.readouterr().out
    assert (folder / 'epoch_2.pth').stat().st_mtime_ns == checkpoint

    with pytest.raises(SystemExit):
        run('--epochs', '3')
    assert 'holds a run with epochs 2, not 3; give another --work-dir' in capfd.readouterr().err


FINISHED = [
    dict(lr=0.1, time=0.1, loss=1.0, epoch=1, iter=2, step=2),
    {'accuracy/top1': 50.0, 'step': 1},
]


def test_a_failing_run_is_told_and_the_others_go_on(project, monkeypatch, capfd):
    def start(job):
        assert not any('condensation' in argument for argument in job.arguments)
        code = "raise ValueError('no training at 0.2')"
        if job.setting.options[FCT] == 0.15:
            logs = job.folder / '20260101_000000' / 'vis_data'
            logs.mkdir(parents=True)
            (logs / 'scalars.json').write_text(''.join(f'{json.dumps(n)}\n' for n in FINISHED))
            code = ''
        with (job.folder / 'output.log').open('a') as log:
            return subprocess.Popen([sys.executable, '-c', code], stderr=log)

    monkeypatch.setattr('mmubn.reproduce.run._start', start)
    rows = ('--rows', 'UBN, FCT 0.15', 'UBN, FCT 0.2', '--no-condensation')
    with pytest.raises(SystemExit) as caught:
        run_tool('reproduce', 'run', 'figure6', *TINY[1:5], *rows, '--data-root', 'images', *ONE)
    assert caught.value.code == 1
    assert states(project) == {'tiny-UBN': 'done', 'tiny-UBN-fct=0.2': 'part'}
    line = 'tiny-UBN-fct=0.2/seed0: ValueError: no training at 0.2'
    assert capfd.readouterr().err.endswith(f'1 of 2 runs failed:\n  {line}\n')
    text = (project / 'runs' / 'report' / 'report.md').read_text()
    assert '| UBN, FCT 0.2 | top1 | 95.58 |  | 1 part |  |' in text

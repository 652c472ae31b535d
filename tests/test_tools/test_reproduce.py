"""tools/reproduce.py on real trainings: it skips, resumes, refuses and goes on."""

import pytest
from tool import run_tool

from mmubn.reproduce.logs import read_run

pytestmark = pytest.mark.usefixtures('metafiles_read_once')
TINY = ('table3', '--config', 'tiny.py', '--work-dir', 'runs', '--rows', 'BN', 'UBN')
ONE = ('--seeds', '1', '--epochs', '1')


def run(*argv):
    run_tool('reproduce', 'run', *TINY, '--data-root', 'images', '--seeds', '1', *argv)


def states(project) -> dict:
    found = sorted((project / 'runs').glob('*/seed*'))
    return {f.parent.name: read_run(f).state for f in found}


@pytest.mark.slow
def test_runs_skip_resume_and_refuse_another_length(project, capfd):
    run('--epochs', '2', '--rows', 'UBN', '--no-condensation')
    assert states(project) == {'tiny-UBN': 'done'}
    folder = project / 'runs' / 'tiny-UBN' / 'seed0'
    assert read_run(folder).epoch == 2

    # As if it had been killed in its second epoch.
    (folder / 'epoch_2.pth').unlink()
    (folder / 'last_checkpoint').write_text(str(folder / 'epoch_1.pth'))
    (log,) = folder.glob('*/vis_data/scalars.json')
    log.write_text(''.join(log.read_text().partition('"step": 1}\n')[:2]))
    assert states(project) == {'tiny-UBN': 'part'}
    run('--epochs', '2', '--jobs', '2', '--no-condensation')
    assert states(project) == {'tiny-BN': 'done', 'tiny-UBN': 'done'}
    assert 'resumed epoch: 1' in (folder / 'output.log').read_text()
    assert (
        '| UBN | top1 | 78.67 | +1.65 | 79.9 |'
        in (project / 'runs' / 'report' / 'report.md').read_text()
    )

    capfd.readouterr()
    checkpoint = (folder / 'epoch_2.pth').stat().st_mtime_ns
    run('--epochs', '2', '--no-condensation')
    assert '2 of 2 runs are finished' in capfd.readouterr().out
    assert (folder / 'epoch_2.pth').stat().st_mtime_ns == checkpoint

    with pytest.raises(SystemExit):
        run('--epochs', '3')
    assert 'holds a run with epochs 2, not 3; give another --work-dir' in capfd.readouterr().err


REFUSES = """
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module()
class Refuses(Hook):
    def before_train(self, runner):
        if runner.cfg.model.backbone.norm_cfg.fct == 0.2:
            raise ValueError('no training at 0.2')
"""


def test_a_failing_run_is_told_and_the_others_go_on(project, monkeypatch, capfd):
    (project / 'refuses.py').write_text(REFUSES)
    monkeypatch.setenv('PYTHONPATH', str(project))
    monkeypatch.syspath_prepend(project)
    config = project / 'tiny.py'
    hook = "custom_hooks = [dict(type='Refuses'), *_base_.custom_hooks]\n"
    imports = "custom_imports = dict(imports=['mmubn', 'refuses'])\n"
    config.write_text(config.read_text() + imports + hook)
    rows = ('--rows', 'UBN, FCT 0.15', 'UBN, FCT 0.2')
    with pytest.raises(SystemExit) as caught:
        run_tool('reproduce', 'run', 'figure6', *TINY[1:5], *rows, '--data-root', 'images', *ONE)
    assert caught.value.code == 1
    assert states(project) == {'tiny-UBN': 'done', 'tiny-UBN-fct=0.2': 'part'}
    line = 'tiny-UBN-fct=0.2/seed0: ValueError: no training at 0.2'
    assert capfd.readouterr().err.endswith(f'1 of 2 runs failed:\n  {line}\n')
    # Beside the config's own hooks, condensation is recorded; the report draws it.
    assert (project / 'runs' / 'tiny-UBN' / 'seed0' / 'condensation.csv').is_file()
    text = (project / 'runs' / 'report' / 'report.md').read_text()
    assert '| UBN, FCT 0.2 | top1 |  |  | 95.58 |  | 1 part |  |' in text
    run_tool('reproduce', 'report', 'figure2', *TINY[1:5], '--out', 'out')
    assert (project / 'out' / 'figure2_condensation.png').is_file()

"""tools/reproduce.py: its rows, its runs, and its arithmetic."""

import csv
import json
import math
import sys
from pathlib import Path

import pytest
from mmengine.config import Config
from tiny_project import ROOT

sys.path.insert(0, str(ROOT / 'tools'))  # as Python does for a script there

import reproduce
import reproduce_logs
import reproduce_report
import reproduce_rows
import reproduce_run

from mmubn.cli.errors import CommandError

pytestmark = pytest.mark.usefixtures('metafiles_read_once')
TINY = ('table3', '--config', 'tiny.py', '--work-dir', 'runs', '--rows', 'BN', 'UBN')


# --- Rows.


def test_every_row_has_a_config():
    assert {row.experiment for row in reproduce_rows.ROWS} == set(reproduce_rows.TITLES)
    for row in reproduce_rows.ROWS:
        assert (ROOT / 'configs' / row.config).is_file(), row.label


def test_configs_have_the_norm_that_the_rows_say():
    rows = reproduce_rows.select(['table3'], ['*ResNet-50*'], one_network=False)
    rows += reproduce_rows.select(['table6'], ['*R50, UBN'], one_network=False)
    rows += reproduce_rows.select(['hosts-detection'], ['*R50*'], one_network=False)
    assert {row.base for row in rows} == set(reproduce_rows.NORM_CFGS)
    for row in rows:
        cfg = Config.fromfile(ROOT / 'configs' / row.config)
        norm_cfg = cfg.model.backbone.norm_cfg
        norm_cfg.pop('requires_grad', None)
        assert norm_cfg == row.norm_cfg
        before = cfg.to_dict()
        cfg.merge_from_dict(dict(row.options))
        assert cfg.to_dict() == before


def test_labels_are_unique_and_each_rectified_row_has_its_baseline():
    labels = [(row.experiment, row.label) for row in reproduce_rows.ROWS]
    assert len(set(labels)) == len(labels)
    for row in reproduce_rows.ROWS:
        if row.norm != 'BN' and row.experiment != 'table7':  # which has no BN
            assert sum(r.is_baseline_of(row) for r in reproduce_rows.ROWS) == 1, row.label


def test_papers_values_are_those_of_the_csv():
    values = {(row.experiment, row.label): row.paper for row in reproduce_rows.ROWS}
    assert values['table3', 'CIFAR-100, ResNet-50, UBN'] == {'top1': 78.67, 'top5': 94.4}
    assert values['table7', 'CIFAR-10, ResNet-18, UBN, batch 64'] == {'top1': 94.9}
    assert values['table8', 'CIFAR-10, ResNet-50, UBN'] == {'train_seconds': 3606, 'epochs': 73}
    mask = values['table6', 'COCO, Mask R-CNN R50, BN']
    assert (mask['bbox_AP'], mask['segm_APl']) == (34.0, 46.4)
    with reproduce_rows.PAPER.open(newline='') as file:
        assert len(list(csv.DictReader(file))) == sum(len(paper) for paper in values.values())


def test_one_network_keeps_the_norms_of_the_first():
    rows = reproduce_rows.select(['table3'], [], one_network=True)
    assert [row.norm for row in rows] == ['IN', 'GN', 'BN', 'IEBN', 'RBN', 'BNET', 'UBN']
    assert {row.model for row in rows} == {'ResNet-50'}


def test_rows_that_say_the_same_share_their_runs():
    rows = {(row.experiment, row.label): row for row in reproduce_rows.ROWS}
    for a, b in (
        (('table4', 'CIFAR-10, ResNet-50, BN'), ('figure5', 'CIFAR-10, ResNet-50, BN')),
        (
            ('table4', 'CIFAR-10, ResNet-101, UBN'),
            ('figure6', 'CIFAR-10, ResNet-101, UBN, FCT 0.15'),
        ),
    ):
        assert reproduce_run.make_setting(rows[a]) == reproduce_run.make_setting(rows[b])
    every = {(r.config, str(r.norm_cfg), str(r.extra)) for r in reproduce_rows.ROWS}
    assert len({reproduce_run.make_setting(r).name for r in reproduce_rows.ROWS}) == len(every)


def test_the_small_network_takes_every_norm():
    rows = reproduce_rows.select(['table3', 'figure5', 'ours'], [], one_network=True)
    settings = {s.name: s for s in (reproduce_run.make_setting(r, reproduce.SMALL) for r in rows)}
    groups = settings['resnet18_small_cifar10-GN'].options['model.backbone.norm_cfg.num_groups']
    assert groups == 8  # of 16 channels
    base = Config.fromfile(reproduce.SMALL).to_dict()
    for setting in settings.values():
        cfg = Config(base)
        cfg.merge_from_dict(dict(setting.options))
        assert cfg.model.backbone.norm_cfg.type == setting.norm


# --- The schedule.


def test_the_schedule_is_scaled_with_the_length():
    cfg = Config.fromfile(ROOT / 'configs' / 'cifar100' / 'resnet50_ubn_cifar100.py')
    assert reproduce_run.scaled_schedule(cfg, 20) == {
        'train_cfg.max_epochs': 20,
        'param_scheduler.0.begin': 0,
        'param_scheduler.0.end': 1,  # a tenth of an epoch, in whole epochs
        'param_scheduler.1.milestones': [6, 12, 16],
    }
    cfg = Config.fromfile(ROOT / 'configs' / 'mask_rcnn_r50_ubn_1x_coco.py')
    options = reproduce_run.scaled_schedule(cfg, 6)
    assert options['param_scheduler.0.end'] == 250  # iterations of the warm-up
    assert options['param_scheduler.1.milestones'] == [4, 6]
    cfg = Config.fromfile(ROOT / 'configs' / 'cifar10' / 'resnet18_bn_cifar10.py')
    scaled = reproduce_run.scaled_schedule(cfg, 20)['param_scheduler.milestones']
    assert scaled == [10, 15]
    cfg.merge_from_dict(reproduce_run.scaled_schedule(cfg, 20))
    assert cfg.param_scheduler.milestones == [10, 15]


# --- Hand-made logs.


def write_run(folder: Path, epochs: int, parts, seed=0):
    """``parts``: for each start of the training a list of (epoch, iteration time, top1)."""
    folder.mkdir(parents=True)
    record = dict(config='net', options=[], epochs=epochs, seed=seed, data='d', gpus=0)
    record.update(device='cpu: none', torch='2', commit='abc')
    (folder / reproduce_logs.SETTINGS).write_text(json.dumps(record))
    for number, part in enumerate(parts):
        logs = folder / f'2026010{number}_000000' / 'vis_data'
        logs.mkdir(parents=True)
        lines = []
        for epoch, seconds, top1 in part:
            for step in (10, 15):  # 15 iterations an epoch, a line every 10
                iteration = 15 * (epoch - 1) + step
                line = dict(lr=0.1, time=seconds, epoch=epoch, iter=iteration, step=iteration)
                lines.append({**line, 'loss': 6 / epoch + (step == 15)})
            lines.append({'condensation/all/train/input': 0.5, 'step': 15 * epoch})
            lines.append({'accuracy/top1': top1, 'time': 99.0, 'step': epoch})
        (logs / 'scalars.json').write_text('\n'.join(map(json.dumps, lines)) + '\n{"cut')


def small(norm: str, seed: int) -> Path:
    return Path('runs') / f'net-{norm}' / f'seed{seed}'


@pytest.fixture
def logs(tmp_path, monkeypatch):
    """BN and UBN, three seeds each; the values are all there is to the report."""
    monkeypatch.chdir(tmp_path)
    Path('net.py').write_text('train_cfg = dict(max_epochs=3)\nmodel = dict(backbone=dict())\n')
    bn = [(30.0, 41.0, 40.0), (30.0, 41.0, 42.0), (30.0, 43.0, 44.0)]
    ubn = [(40.0, 39.0, 41.0), (20.0, 42.0, 45.0), (43.0, 44.0, 48.0)]
    for seed in range(3):
        for norm, curves, seconds in (('BN', bn, 0.1), ('UBN', ubn, 0.2)):
            part = [(e + 1, seconds, v) for e, v in enumerate(curves[seed])]
            write_run(small(norm, seed), 3, [part], seed)
    return tmp_path


REPORT = ('report', 'table3', 'table8', '--config', 'net.py', '--work-dir', 'runs', '--out', 'out')


def test_a_resumed_run_replaces_what_it_repeats(tmp_path):
    first = [(1, 0.1, 10.0), (2, 0.1, 20.0), (3, 0.1, 30.0)]
    second = [(3, 0.3, 33.0), (4, 0.3, 44.0)]
    write_run(tmp_path / 'seed0', 4, [first, second])
    run = reproduce_logs.read_run(tmp_path / 'seed0')
    assert run.curves['top1'] == {1: 10.0, 2: 20.0, 3: 33.0, 4: 44.0}
    assert run.curves.keys() == {'top1', 'loss'}
    assert run.seconds == pytest.approx({1: 1.5, 2: 3.0, 3: 7.5, 4: 12.0})
    assert run.state == 'done'
    assert run.epoch_reaching('top1', 20) == 2
    assert run.epoch_reaching('top1', 44.1) == 0


def test_the_loss_of_an_epoch_is_the_mean_of_its_iterations(tmp_path):
    write_run(tmp_path / 'seed0', 3, [[(1, 0.1, 10.0), (2, 0.1, 20.0)]])
    (log,) = tmp_path.glob('seed0/*/vis_data/scalars.json')
    begun = dict(lr=0.1, time=0.1, epoch=3, iter=40, step=40, loss=9.0)
    log.write_text(log.read_text().replace('{"cut', f'{json.dumps(begun)}\n'))
    run = reproduce_logs.read_run(tmp_path / 'seed0')
    # Ten iterations of the first value, five of one that is larger by 1.
    assert run.curves['loss'] == pytest.approx({1: 6 + 1 / 3, 2: 3 + 1 / 3, 3: 9.0})
    assert run.epoch == 2
    assert run.state == 'part'


def test_report_has_the_values_computed_by_hand(logs):
    reproduce.main(REPORT)
    with Path('out/report.csv').open(newline='') as file:
        cells = {(c['experiment'], c['norm'], c['metric']): c for c in csv.DictReader(file)}
    ubn = cells['table3', 'UBN', 'top1']
    # Last epochs 40, 42, 44 and 41, 45, 48: differences 1, 3, 4 of mean 2.667 and sd 1.528;
    # the t of two degrees of freedom is 4.303, so half an interval is 3.795.
    assert (ubn['mean'], ubn['sd'], ubn['n']) == ('44.67', '3.51', '3')
    assert (ubn['minus_bn'], ubn['pairs']) == ('2.67', '3')
    assert (ubn['ci95_low'], ubn['ci95_high']) == ('-1.13', '6.46')
    assert (ubn['paper'], ubn['paper_minus_bn']) == ('78.67', '1.65')
    assert cells['table3', 'BN', 'top1']['minus_bn'] == ''
    rbn = cells['table3', 'RBN', 'top1']
    assert (rbn['state'], rbn['mean'], rbn['paper']) == ('not run', '', '77.79')

    text = Path('out/report.md').read_text()
    assert (
        '| UBN | top1 | 78.67 | +1.65 | 79.9 | 44.67 ± 3.51 | 3 done | +2.67 [-1.13, +6.46] |'
        in text
    )
    assert '| RBN | top1 | 77.79 | +0.77 | 79.9 |  | not run |  |' in text
    assert '- ResNet-50 on CIFAR-100: `mmpretrain::resnet/resnet50_8xb16_cifar100.py`, ' in text
    assert '`net`; 3 epochs; data `d`; seeds 0, 1, 2; cpu: none; torch 2; commit abc' in text
    with Path('out/curves.csv').open(newline='') as file:
        curves = list(csv.DictReader(file))
    assert len(curves) == 2 * 18
    first = dict(setting='net-BN', epoch='1', train_seconds='1.50', metric='top1', value='30')
    assert curves[0].items() >= first.items()
    assert {c['metric'] for c in curves} == {'top1', 'loss'}


def test_table_8_is_of_pairs(logs):
    reproduce.main(REPORT)
    text = Path('out/report.md').read_text()
    (row,) = [line for line in text.splitlines() if line.startswith('| CIFAR-10, ResNet-34')]
    _, _, paper_bn, paper_ubn, bn, itself, ubn, ratio, _ = (c.strip() for c in row.split('|'))
    assert (paper_bn, paper_ubn) == ('200 epochs, 3760 s', '101 epochs, 3605 s')
    assert bn == '3.0 epochs, 4.5 s'  # 45 iterations of 0.1 s
    assert itself == '2.7 epochs, 4.0 s'  # 2, 3 and 3
    assert ubn == '1.7 epochs, 5.0 s'  # 1, 2 and 2 epochs of 3 s
    assert ratio == '2.00 an epoch'


def test_table_8_says_who_never_got_there(logs):
    for seed, top1 in ((0, 50.0), (1, 30.0), (2, 99.0)):  # of BN, beyond UBN but in one
        (log,) = small('BN', seed).glob('*/vis_data/scalars.json')
        lines = [json.loads(line) for line in log.read_text().splitlines()[:-1]]
        lines[-1]['accuracy/top1'] = top1
        log.write_text('\n'.join(map(json.dumps, lines)))
    reproduce.main(REPORT)
    assert '| 2.0 epochs, 6.0 s (in 1 of 3) | 2.00 an epoch |' in Path('out/report.md').read_text()


def test_the_report_has_the_layers_of_the_last_epoch(logs):
    columns = 'epoch,iter,layer,type,where,similarity,running_similarity,batch_statistics_used'
    rows = ['2,30,a,UBN,train/input,0.1,0.2,1', '3,45,a,UBN,train/input,0.3,0.4,0']
    rows += ['3,45,a,UBN,fixed/input,0.5,0.4,']
    (small('UBN', 1) / 'condensation.csv').write_text('\r\n'.join([columns, *rows, '']))
    reproduce.main(REPORT)
    _, row = Path('out/layers.csv').read_text().splitlines()
    assert row == 'net-UBN,1,3,a,UBN,0.3,0.4,0'


def test_an_unfinished_run_counts_for_nothing(logs):
    path = small('UBN', 2) / reproduce_logs.SETTINGS
    path.write_text(path.read_text().replace('"epochs": 3', '"epochs": 5'))
    reproduce.main(REPORT)
    assert '43.00 ± 2.83 | 2 done, 1 part | +2.00 [' in Path('out/report.md').read_text()


def test_pictures_of_the_report(logs, capsys):
    reproduce.main(REPORT)
    pictures = [Path(line).name for line in capsys.readouterr().out.splitlines()]
    for name in ('table3_epochs', 'table3_time', 'table3_differences', 'table8_time'):
        assert f'{name}.png' in pictures
        assert (logs / 'out' / f'{name}.png').stat().st_size > 5000


def test_our_own_rows_are_set_against_each_other(logs):
    for seed, top1 in enumerate((42.0, 45.0, 49.0)):  # UBN has 41, 45 and 48
        name = 'UBN-fct_warmup=0'
        write_run(small(name, seed), 3, [[(e, 0.1, top1) for e in (1, 2, 3)]], seed)
    reproduce.main([*REPORT[:1], 'ours', *REPORT[3:]])
    text = Path('out/report.md').read_text()
    # Differences 1, 0, 1: mean 0.667, sd 0.577.
    assert '| UBN, literal gate | UBN | top1 | +0.67 [-0.77, +2.10] |' in text
    assert '| BNET, identity kernel | BNET, published kernel | top1 | not run |' in text


def test_the_report_of_detection_has_the_loss(logs, capsys):
    for log in Path('runs').glob('*/*/*/vis_data/scalars.json'):
        text = log.read_text().replace('accuracy/top1', 'coco/bbox_mAP')
        for value in (30, 39, 40, 41, 42, 43, 44, 45, 48, 20):
            text = text.replace(f'"coco/bbox_mAP": {value}.0', f'"coco/bbox_mAP": 0.{value}')
        log.write_text(text)
    argv = list(REPORT)
    argv[1:3] = ['table6']
    reproduce.main(argv)
    text = Path('out/report.md').read_text()
    assert (
        '| UBN | bbox_AP | 38.5 | +4.50 | 38.2 | 44.67 ± 3.51 | 3 done | +2.67 [-1.13, +6.46] |'
        in text
    )
    assert '| UBN | loss |  |  |  | 2.33 ± 0.00 | 3 done | +0.00 [+0.00, +0.00] |' in text
    assert 'out/table6_loss.png' in capsys.readouterr().out


def test_a_single_seed_has_no_interval():
    mean, half, pairs = reproduce_report.paired({0: 3.0, 1: 9.0}, {0: 1.0})
    assert (mean, pairs) == (2.0, 1)
    assert math.isnan(half)


# --- Real runs.


ONE = ('--seeds', '1', '--epochs', '1')


def run(*argv):
    reproduce.main(['run', *TINY, '--data-root', 'images', '--seeds', '1', *argv])


def states(project) -> dict:
    found = sorted((project / 'runs').glob('*/seed*'))
    return {f.parent.name: reproduce_logs.read_run(f).state for f in found}


def jobs(**changes):
    rows = reproduce_rows.select(['table3'], ['BN'], one_network=True)
    settings = [reproduce_run.make_setting(row, Path('net.py')) for row in rows]
    given = dict(seeds=1, budget=None, epochs=3, user_options=[], flags=[], data_root='one', gpus=0)
    root = Path(changes.pop('work_dir', 'runs'))
    return reproduce_run.make_jobs(settings, root, condensation=False, **{**given, **changes})


@pytest.mark.parametrize(
    ('changes', 'key'),
    [
        (dict(data_root='two'), 'data two'),
        (dict(data_root='other/one'), 'data_root .*other/one; .*change runs/.*run.json'),
        (dict(data_root=None), 'data None'),
        (dict(flags=['--eval-on-train']), r"flags \['--eval-on-train'\]"),
        (dict(gpus=2), 'gpus 2'),
        (dict(user_options=['a=1']), r"options .*'a=1'"),
        (dict(epochs=2), 'epochs 2'),
        ('batch_size = 3', 'config_digest [0-9a-f]{16}'),
    ],
)
def test_a_run_of_another_kind_is_refused(tmp_path, monkeypatch, changes, key):
    monkeypatch.chdir(tmp_path)
    config = Path('net.py')
    config.write_text('train_cfg = dict(max_epochs=3)\nmodel = dict(backbone=dict())\n')
    (job,) = jobs()
    write_run(job.folder, 3, [[(1, 0.1, 10.0)]])
    (job.folder / reproduce_logs.SETTINGS).write_text(json.dumps(job.settings))
    assert [again.settings for again in jobs()] == [job.settings]
    if isinstance(changes, str):
        config.write_text(config.read_text() + changes)
        changes = {}
    changed = key.split()[0]
    with pytest.raises(
        CommandError, match=f'holds a run with {changed} .*, not .*{key.split()[-1]}'
    ):
        jobs(**changes)


def test_a_run_killed_before_its_last_validation_goes_back_one_checkpoint(logs):
    (job,) = jobs(work_dir='others')
    job.folder.mkdir(parents=True)
    for name in ('epoch_2.pth', 'epoch_3.pth'):
        (job.folder / name).touch()
    resume = job.arguments.index('--resume')
    (job.folder / 'last_checkpoint').write_text('epoch_2.pth')
    assert reproduce_run._arguments(job) == job.arguments
    (job.folder / 'last_checkpoint').write_text('epoch_3.pth')
    arguments = reproduce_run._arguments(job)
    assert arguments[resume + 1] == str(job.folder / 'epoch_2.pth')
    assert [*arguments[: resume + 1], *arguments[resume + 2 :]] == job.arguments


def test_what_an_older_version_did_not_write_is_not_compared(logs):
    folder = Path('runs/net-BN/seed0')
    assert 'flags' not in reproduce_logs.read_run(folder).settings
    record = json.loads((folder / 'run.json').read_text())
    (folder / 'run.json').write_text(json.dumps({**record, 'options': [], 'data': 'one'}))
    old = reproduce_logs.read_run(folder).settings
    reproduce_run._check_same(folder, {**old, 'flags': ['--amp']})


def test_settings_cut_short_are_one_line(logs, capsys):
    path = Path('runs/net-BN/seed0/run.json')
    path.write_text(path.read_text()[:-9])
    with pytest.raises(SystemExit):
        reproduce.main(REPORT)
    assert capsys.readouterr().err.startswith(f'error: {path}: is cut short')


@pytest.mark.slow
def test_runs_skip_resume_and_refuse_another_length(project, capfd):
    run('--epochs', '2', '--rows', 'UBN', '--no-condensation')
    assert states(project) == {'tiny-UBN': 'done'}
    folder = project / 'runs' / 'tiny-UBN' / 'seed0'
    assert reproduce_logs.read_run(folder).epoch == 2

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


def test_trainings_side_by_side_share_the_threads(monkeypatch):
    monkeypatch.setattr(reproduce_run.torch, 'get_num_threads', lambda: 8)
    monkeypatch.delenv('OMP_NUM_THREADS')  # conftest.py sets it
    assert [reproduce_run.threads_of_each(jobs) for jobs in (1, 3, 16)] == [8, 2, 1]
    monkeypatch.setenv('OMP_NUM_THREADS', '8')
    assert reproduce_run.threads_of_each(3) == 8


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
    hook = "custom_hooks = [dict(type='Refuses')]\n"
    config.write_text(config.read_text().replace("['mmubn']", "['mmubn', 'refuses']") + hook)
    rows = ('--rows', 'UBN, FCT 0.15', 'UBN, FCT 0.2')
    with pytest.raises(SystemExit) as caught:
        reproduce.main(['run', 'figure6', *TINY[1:5], *rows, '--data-root', 'images', *ONE])
    assert caught.value.code == 1
    assert states(project) == {'tiny-UBN': 'done', 'tiny-UBN-fct=0.2': 'part'}
    line = 'tiny-UBN-fct=0.2/seed0: ValueError: no training at 0.2'
    assert capfd.readouterr().err.endswith(f'1 of 2 runs failed:\n  {line}\n')
    # Beside the config's own hooks, condensation is recorded; the report draws it.
    assert (project / 'runs' / 'tiny-UBN' / 'seed0' / 'condensation.csv').is_file()
    text = (project / 'runs' / 'report' / 'report.md').read_text()
    assert '| UBN, FCT 0.2 | top1 |  |  | 95.58 |  | 1 part |  |' in text
    reproduce.main(['report', 'figure2', *TINY[1:5], '--out', 'out'])
    assert (project / 'out' / 'figure2_condensation.png').is_file()


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (('list', 'table9'), 'no experiment table9; there are table2,'),
        (('list', 'table3', '--rows', 'LN'), '--rows LN: no such row; the norms are IN, GN, BN'),
        (('run',), 'run: name the experiments, such as table3'),
        (('run', 'table3', '--config', 'absent.py'), 'no config absent.py'),
        (('run', 'table5', '--config', str(reproduce.SMALL)), f'{reproduce.SMALL} is for classif'),
        (
            ('report', '--work-dir', 'nowhere'),
            'nowhere: no finished run of these rows; `run` trains them',
        ),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        reproduce.main(argv)
    assert capsys.readouterr().err.startswith(f'error: {message}')
    assert list(tmp_path.iterdir()) == []


def test_list_names_the_state_of_each_row(logs, capsys):
    reproduce.main(['list', 'table3', '--config', 'net.py', '--work-dir', 'runs'])
    out = capsys.readouterr().out
    host = "host's own BN: top1 79.9, top5 95.19"
    assert f'CIFAR-100, ResNet-50, UBN  [3 done]  paper: top1 78.67, top5 94.4  {host}\n' in out
    assert 'CIFAR-100, ResNet-50, RBN  [not run]  paper: top1 77.79, top5 94.2' in out

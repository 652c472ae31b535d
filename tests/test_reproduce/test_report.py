"""The report: its arithmetic, its tables and its pictures."""

import json
import math
import shutil
from pathlib import Path

import pytest
from hand_made import small, write_logs, write_run
from tool import read_csv, run_tool, saved_figures

from mmubn.reproduce.experiments import EXPERIMENTS
from mmubn.reproduce.logs import SETTINGS, read_run
from mmubn.reproduce.report import Line, condensation, mean_sd, paired
from mmubn.reproduce.run import make_setting
from mmubn.runs import COLUMNS

FROM = ('--config', 'net.py', '--work-dir', 'runs')


def reported(*experiments: str) -> str:
    """What the report says of the logs; of tables 3 and 8 unless others are named."""
    names = experiments or ('table3', 'table8')
    run_tool('reproduce', 'report', *names, *FROM, '--out', 'out')
    return Path('out/report.md').read_text()


@pytest.fixture(scope='module')
def report(tmp_path_factory):
    """The folder of the report on the logs, and its figures by the names of their files."""
    folder = tmp_path_factory.mktemp('report')
    with pytest.MonkeyPatch.context() as patch, saved_figures() as drawn:
        patch.chdir(folder)
        write_logs()
        reported()
    return folder / 'out', drawn


def test_report_has_the_values_computed_by_hand(report):
    out, _ = report
    rows = read_csv(out / 'report.csv')
    cells = {(c['experiment'], c['norm'], c['metric']): c for c in rows}
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

    text = (out / 'report.md').read_text()
    assert (
        '| UBN | top1 | 78.67 | +1.65 | 79.9 | 44.67 ± 3.51 | 3 done | +2.67 [-1.13, +6.46] |'
        in text
    )
    assert '| RBN | top1 | 77.79 | +0.77 | 79.9 |  | not run |  |' in text
    assert '- ResNet-50 on CIFAR-100: `mmpretrain::resnet/resnet50_8xb16_cifar100.py`, ' in text
    assert '`net`; 3 epochs; data `d`; seeds 0, 1, 2; cpu: none; torch 2; commit abc' in text
    curves = read_csv(out / 'curves.csv')
    assert len(curves) == 2 * 18
    first = dict(setting='net-BN', epoch='1', train_seconds='1.50', metric='top1', value='30')
    assert curves[0].items() >= first.items()
    assert {c['metric'] for c in curves} == {'top1', 'loss'}


def test_table_8_is_of_pairs(report):
    text = (report[0] / 'report.md').read_text()
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
    assert '| 2.0 epochs, 6.0 s (in 1 of 3) | 2.00 an epoch |' in reported()


def test_the_report_has_the_layers_of_the_last_epoch(logs):
    rows = ['2,30,a,UBN,train/input,0.1,0.2,1', '3,45,a,UBN,train/input,0.3,0.4,0']
    rows += ['3,45,a,UBN,fixed/input,0.5,0.4,']
    write_table(small('UBN', 1), *rows)
    reported()
    _, *rows = Path('out/layers.csv').read_text().splitlines()
    assert rows == [
        'table3,net-UBN,1,3,a,UBN,train/input,0.3,0.4,0',
        'table3,net-UBN,1,3,a,UBN,fixed/input,0.5,0.4,',
    ]


def write_table(run: Path, *rows: str):
    (run / 'condensation.csv').write_text('\r\n'.join([','.join(COLUMNS), *rows, '']))


def test_condensation_is_that_after_the_last_epoch(logs):
    write_table(small('BN', 0), '2,30,a,BN,fixed/input,0.1,,')
    write_table(small('BN', 1), '3,45,a,BN,fixed/input,0.2,,')
    # The first run did not record its end; the second is drawn in its place.
    assert '| BN | 20.00 | 1 |  |' in reported('figure7-10')
    assert Path('out/figure7-10_layers.png').is_file()


def test_condensation_names_the_network(logs):
    for norm in ('BN', 'UBN'):
        write_table(small(norm, 0), '3,45,a,BN,fixed/input,0.2,,')
    lines = [
        Line(row, make_setting(row, Path('net.py')), {0: read_run(small(row.norm, 0))})
        for row in EXPERIMENTS['figure7-10'].rows
    ]
    text = '\n'.join(condensation(lines))
    for name in ('ResNet-50', 'Res2Net-50'):
        assert f'| ImageNet, {name}, UBN | 20.00 | 1 | +0.00 |' in text


def test_a_table_that_is_none_is_one_line(logs, capsys):
    (small('BN', 0) / 'condensation.csv').write_bytes(b'\0' * 10 + b'\r\n0,0\r\n')
    with pytest.raises(SystemExit):
        reported()
    path = small('BN', 0) / 'condensation.csv'
    assert capsys.readouterr().err.startswith(f'error: {path} is no condensation table')


def test_studies_with_settings_of_the_same_names(logs):
    for study, top1 in (('strong-recipe', 40.0), ('strong-recipe-tuned', 41.0)):
        name = 'resnet18_strong_cifar100-BN'
        write_run(Path('work_dirs/reproduce', study, name, 'seed0'), 1, [[(1, 0.1, top1)]])
    run_tool('reproduce', 'report', '--out', 'out')
    rows = [row for row in read_csv(Path('out/curves.csv')) if row['metric'] == 'top1']
    assert [(row['experiment'], row['value']) for row in rows] == [
        ('strong-recipe', '40'),
        ('strong-recipe-tuned', '41'),
    ]


def test_a_run_without_a_last_value_is_told(logs):
    (log,) = small('UBN', 1).glob('*/vis_data/scalars.json')
    log.write_text(log.read_text().replace('"accuracy/top1": 45.0, ', ''))  # of the last epoch
    text = reported()
    assert '44.50 ± 4.95 | 3 done, 1 without a value | +2.50 [' in text


def test_pictures_of_an_earlier_report_go(logs):
    reported()
    assert Path('out/table3_differences.png').is_file()
    shutil.rmtree('runs/net-UBN')
    reported()
    assert not Path('out/table3_differences.png').exists()


def test_the_default_folder_is_checked(logs, capsys):
    Path('runs/report').touch()
    with pytest.raises(SystemExit):
        run_tool('reproduce', 'report', 'table3', *FROM)
    assert capsys.readouterr().err.startswith('error: --out: cannot write to ')


def test_runs_without_a_fixed_batch_have_a_report(logs):
    for norm in 'BN', 'UBN':
        write_table(small(norm, 0), '3,45,a,UBN,train/input,0.3,0.4,0')  # of fixed_samples=0
    assert 'Condensation' not in reported('figure2')
    assert not list(Path('out').glob('*.png'))


def test_an_unfinished_run_counts_for_nothing(logs):
    path = small('UBN', 2) / SETTINGS
    path.write_text(path.read_text().replace('"epochs": 3', '"epochs": 5'))
    assert '43.00 ± 2.83 | 2 done, 1 part | +2.00 [' in reported()


def test_pictures_of_the_report(report):
    out, drawn = report
    assert {path.name for path in out.glob('*.png')} == set(drawn)
    assert {'table3_differences.png', 'table8_time.png'} <= set(drawn)

    def curves(picture):
        axis = drawn[picture].axes[0]
        return {
            line.get_label(): [[round(float(v), 2) for v in point] for point in line.get_xydata()]
            for line in axis.lines
        }

    bn, ubn = (30.0, 41.67, 42.0), (34.33, 41.67, 44.67)  # means of the seeds
    epochs = dict(BN=list(map(list, enumerate(bn, 1))), UBN=list(map(list, enumerate(ubn, 1))))
    assert curves('table3_epochs.png') == epochs
    assert [y for _, y in curves('table3_time.png')['UBN']] == list(ubn)
    # 15 iterations an epoch, of 0.2 seconds with UBN.
    assert [x for x, _ in curves('table3_time.png')['UBN']] == [3.0, 6.0, 9.0]
    axis = drawn['table3_differences.png'].axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ['UBN']
    assert axis.containers[0].lines[0].get_xdata() == pytest.approx([8 / 3])


def test_our_own_rows_are_set_against_each_other(logs):
    for seed, top1 in enumerate((42.0, 45.0, 49.0)):  # UBN has 41, 45 and 48
        name = 'UBN-fct_warmup=0'
        write_run(small(name, seed), 3, [[(e, 0.1, top1) for e in (1, 2, 3)]], seed)
    text = reported('ours')
    # Differences 1, 0, 1: mean 0.667, sd 0.577.
    assert '| UBN, literal gate | UBN | top1 | +0.67 [-0.77, +2.10] |' in text
    assert '| BNET, identity kernel | BNET, published kernel | top1 | not run |' in text


def test_the_report_of_detection_has_the_loss(logs, capsys):
    for log in Path('runs').glob('*/*/*/vis_data/scalars.json'):
        text = log.read_text().replace('accuracy/top1', 'coco/bbox_mAP')
        for value in (30, 39, 40, 41, 42, 43, 44, 45, 48, 20):
            text = text.replace(f'"coco/bbox_mAP": {value}.0', f'"coco/bbox_mAP": 0.{value}')
        log.write_text(text)
    text = reported('table6')
    assert (
        '| UBN | bbox_AP | 38.5 | +4.50 | 38.2 | 44.67 ± 3.51 | 3 done | +2.67 [-1.13, +6.46] |'
        in text
    )
    assert '| UBN | loss |  |  |  | 2.33 ± 0.00 | 3 done | +0.00 [+0.00, +0.00] |' in text
    assert 'out/table6_loss.png' in capsys.readouterr().out


def test_a_single_seed_has_no_interval():
    mean, half, pairs = paired({0: 3.0, 1: 9.0}, {0: 1.0})
    assert (mean, pairs) == (2.0, 1)
    assert math.isnan(half)


def change_records(norm: str, **changes) -> None:
    for seed in range(3):
        path = small(norm, seed) / SETTINGS
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ('changes', 'why'),
    [
        (dict(epochs=2), 'epochs 2 and 3'),
        (dict(data='e'), 'data e and d'),
        (dict(flags=['--amp']), 'flags --amp and none'),
        (dict(gpus=2), 'GPUs 2 and 1'),
        (dict(options=['a=1']), 'options a=1 and none'),
        (dict(config_digest='new'), 'content of net.py new and old'),
    ],
)
def test_runs_of_other_conditions_are_not_compared(logs, changes, why):
    for norm in ('BN', 'UBN'):
        change_records(norm, flags=[], config_digest='old')
    change_records('UBN', **changes)
    with saved_figures() as drawn:
        text = reported()
    table3, table8 = text.split('## Table 8')
    (row,) = [line for line in table3.splitlines() if line.startswith('| UBN | top1')]
    assert row.endswith('| 3 done |  |')
    note = f'Not compared, since the runs differ: UBN minus BN ({why}).'
    assert table3.count('Not compared') == table3.splitlines().count(note) == 1
    assert '605 s |  |  |  |  |' in table8
    assert table8.splitlines().count(note) == 1
    (cell,) = [
        c
        for c in read_csv(Path('out/report.csv'))
        if (c['experiment'], c['norm'], c['metric']) == ('table3', 'UBN', 'top1')
    ]
    assert cell['minus_bn'] == cell['ci95_low'] == cell['pairs'] == ''
    assert 'table3_differences.png' not in drawn


def test_contrasts_of_other_conditions_are_not_compared(logs):
    for seed in range(3):
        write_run(small('UBN-fct_warmup=0', seed), 2, [[(e, 0.1, 50.0) for e in (1, 2)]], seed)
    text = reported('ours').split('| row | minus |')[1]
    assert '| UBN, literal gate | UBN | top1 |  |' in text
    assert 'UBN, literal gate minus UBN (epochs 2 and 3).' in text


def test_options_of_the_row_itself_may_differ(logs):
    for seed in range(3):
        for batch, norm in ((4, 'BN'), (4, 'UBN')):
            name = f'{norm}-batch_size={batch}-lr=0.00625'
            write_run(small(name, seed), 3, [[(e, 0.1, 50.0 + seed) for e in (1, 2, 3)]], seed)
    for folder in Path('runs').glob('*lr=*/seed*'):
        record = json.loads((folder / SETTINGS).read_text())
        norm = folder.parent.name.split('-')[1]
        record['options'] = [
            f'model.backbone.norm_cfg.type={norm}',
            'train_dataloader.batch_size=4',
        ]
        record['options'] += ['model.backbone.norm_cfg._delete_=True']
        record['options'] += ['optim_wrapper.optimizer.lr=0.00625']
        if norm == 'UBN':
            record['options'].insert(1, 'model.backbone.norm_cfg.fct=0.15')
        (folder / SETTINGS).write_text(json.dumps(record))
    text = reported('small-batches')
    assert '| UBN, batch 4 | top1 | 51.00 ± 1.00 | 3 done | +0.00 [+0.00, +0.00] |' in text
    assert 'Not compared' not in text


def test_seconds_of_an_epoch_are_by_the_epochs_of_each(logs):
    for norm in ('BN', 'UBN'):
        change_records(norm, epochs=2)
    for seed in range(3):  # BN ends after two, UBN was trained on
        (log,) = small('BN', seed).glob('*/vis_data/scalars.json')
        log.write_text('\n'.join(log.read_text().splitlines()[:8]) + '\n')
    assert '| 2.00 an epoch |' in reported()


def test_a_seed_that_diverged_is_shown_without_a_spread(logs):
    (log,) = small('UBN', 1).glob('*/vis_data/scalars.json')
    log.write_text(log.read_text().replace('45.0', 'NaN'))
    assert '| nan | 3 done |  |' in reported()
    assert Path('out/table3_differences.png').is_file()


@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_have_no_spread(bad):
    mean, sd = mean_sd([1.0, bad, 2.0])
    assert not math.isfinite(mean)
    assert math.isnan(sd)
    assert math.isnan(mean_sd([math.inf, -math.inf])[0])
    assert mean_sd([1.0, 3.0]) == (2.0, pytest.approx(math.sqrt(2)))


@pytest.mark.parametrize('seeds', [(1,), (0, 1, 2)])
def test_curves_are_of_the_runs_that_have_the_metric(logs, seeds):
    for seed in seeds:
        (log,) = small('UBN', seed).glob('*/vis_data/scalars.json')
        log.write_text(log.read_text().replace('accuracy/top1', 'accuracy/top5'))
    with saved_figures() as drawn:
        text = reported()
    lines = {line.get_label(): line for line in drawn['table3_epochs.png'].axes[0].lines}
    assert set(lines) == ({'BN', 'UBN'} if len(seeds) == 1 else {'BN'})
    if len(seeds) == 1:
        assert list(lines['UBN'].get_ydata()) == [41.5, 41.5, 44.5]  # seeds 0 and 2
        shown = '44.50 ± 4.95 | 3 done, 1 without a value | +2.50 ['
        assert shown in text

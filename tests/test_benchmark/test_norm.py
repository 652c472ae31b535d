"""The benchmark measures what it says, writes it down, and runs with torch alone."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tool import ROOT, read_csv, run_tool

import mmubn
from mmubn.benchmark import measure, norm
from mmubn.benchmark import rows as benchmark_rows
from mmubn.benchmark.plot import MARKERS, draw_ratios, plot
from mmubn.benchmark.report import RESNET50_LAYERS, goals, resnet50_totals, table
from mmubn.benchmark.rows import COLUMNS, append_csv, make_rows, read_last_run
from mmubn.benchmark.subjects import NORMS
from mmubn.cli.errors import CommandError

TINY = ('--device', 'cpu', '--shapes', '4,3,8,8', '--repeats', '3')


@pytest.fixture
def bench(tmp_path):
    """Runs the tool into ``rows.csv``; returns the rows of the file."""

    def run(*argv):
        run_tool('benchmark_norm', *argv, '--csv', tmp_path / 'rows.csv')
        return read_csv(tmp_path / 'rows.csv')

    return run


def rows_of(times, device='cpu: X, 2 threads', **setting):
    """Rows from the milliseconds of a norm's rounds, half of each forward, half backward."""
    laps = {
        norm: [dict(forward=t / 2, backward=t / 2) for t in rounds]
        for norm, rounds in times.items()
    }
    setting = {
        **dict(model='', shape='4,3,8,8', dtype='float32', layout='contiguous'),
        **setting,
    }
    run = dict(date='2026-01-01T00:00:00', commit='abc', device=device, torch='2', mmubn='0')
    return make_rows({**run, 'triton': ''}, setting, laps)


def find(rows, **wanted):
    (row,) = (r for r in rows if all(r[key] == value for key, value in wanted.items()))
    return row


def test_rows_of_a_run(bench, capsys):
    rows = bench(*TINY, '--norms', 'bn', 'ubn', 'literal', 'rbn', 'bnet')
    assert [(r['norm'], r['what']) for r in rows] == [
        (norm, what)
        for norm in ('bn', 'ubn', 'literal', 'rbn', 'bnet')
        for what in ('forward', 'backward', 'both')
    ]
    for row in rows:
        assert 0 < float(row['p10_ms']) <= float(row['median_ms']) <= float(row['p90_ms'])
        assert row['shape'] == '4,3,8,8'
        assert row['mmubn'] == mmubn.__version__
        assert row['device'].startswith('cpu: ')
    assert float(find(rows, norm='bn', what='both')['ratio_bn']) == 1
    assert float(find(rows, norm='literal', what='both')['ratio_literal']) == 1
    # X, and the mean and deviation of the batch.
    of_bn = int(find(rows, norm='bn', what='both')['saved_bytes'])
    assert of_bn == 4 * (4 * 3 * 8 * 8 + 2 * 3)
    literal = find(rows, norm='literal', what='both')
    assert float(literal['saved_ratio_bn']) >= 3
    assert float(literal['saved_ratio_bn']) == pytest.approx(
        int(literal['saved_bytes']) / of_bn, abs=1e-4
    )
    assert find(rows, norm='ubn', what='forward')['saved_bytes'] == ''
    out, err = capsys.readouterr()
    assert '4,3,8,8 float32 contiguous' in out
    assert 'bytes kept for backward by a layer' in out
    assert err.startswith('[1/1] (4,3,8,8) float32 contiguous\n')


def test_runs_are_appended_below_one_header(bench, tmp_path):
    argv = (*TINY, '--norms', 'bn', '--dtypes', 'float32', 'bfloat16')
    assert len(bench(*argv, '--layouts', 'channels_last')) == 6
    rows = bench(*argv, '--layouts', 'contiguous')
    assert len(rows) == 12
    assert [row['dtype'] for row in rows[2:4]] == ['float32', 'bfloat16']
    assert {row['layout'] for row in rows[:6]} == {'channels_last'}
    assert (tmp_path / 'rows.csv').read_text().count('median_ms') == 1


def test_other_columns_are_refused_before_measuring(bench, tmp_path, capsys):
    (tmp_path / 'rows.csv').write_text('norm,ms\nbn,1\n')
    with pytest.raises(SystemExit, match='1'):
        bench(*TINY)
    reason = 'rows.csv: its columns are not those of this version'
    assert capsys.readouterr().err.startswith(f'error: {tmp_path}/{reason}')
    assert (tmp_path / 'rows.csv').read_text() == 'norm,ms\nbn,1\n'


@pytest.mark.parametrize(
    ('option', 'place', 'reason'),
    [
        ('--csv', 'file/x.csv', r'cannot write to .*file \(Not a directory\); name another place'),
        ('--csv', 'folder', 'folder is a folder; name a file'),
        ('--plot', 'file/x.png', r'cannot write to .*file \(Not a directory\); name another place'),
        ('--plot', 'x.zzz', r'x.zzz must end with one of .*\.png, '),
    ],
)
def test_places_are_checked_before_measuring(tmp_path, monkeypatch, capsys, option, place, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'file').touch()
    (tmp_path / 'folder').mkdir()
    monkeypatch.setattr(measure, 'race', None)
    with pytest.raises(SystemExit):
        run_tool('benchmark_norm', *TINY, '--csv', 'rows.csv', option, place)
    assert re.search(f'^error: {option}: {reason}', capsys.readouterr().err, re.MULTILINE)
    assert not (tmp_path / 'rows.csv').exists()


def test_ctrl_c_keeps_the_settings_that_ended(bench, tmp_path, monkeypatch, capsys):
    race = measure.race
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return race(*args)

    monkeypatch.setattr(measure, 'race', interrupted)
    with pytest.raises(SystemExit) as caught:
        bench(*TINY, '--norms', 'bn', 'ubn', '--dtypes', 'float32', 'bfloat16')
    assert caught.value.code == 130
    assert [row['dtype'] for row in read_csv(tmp_path / 'rows.csv')] == ['float32'] * 6
    out, err = capsys.readouterr()
    assert 'interrupted; what was measured is in' in err
    assert 'bytes kept for backward by a layer' in out


def test_setting_that_fails_is_left_out(bench, tmp_path, monkeypatch, capsys):
    race = measure.race

    def failing(*args):
        monkeypatch.setattr(measure, 'race', race)
        raise RuntimeError('illegal memory access')

    monkeypatch.setattr(measure, 'race', failing)
    with pytest.raises(SystemExit) as caught:
        bench(*TINY, '--norms', 'bn', '--dtypes', 'float32', 'bfloat16')
    assert caught.value.code == 1
    assert [row['dtype'] for row in read_csv(tmp_path / 'rows.csv')] == ['bfloat16'] * 3
    assert 'RuntimeError: illegal memory access' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (['--shapes', '4,3,8'], "'4,3,8' is not N,C,H,W"),
        (['--norms', 'gn'], "invalid choice: 'gn'"),
        (['--plot-only'], '--plot-only needs --plot FILE.png'),
        (['--repeats', '0'], 'error: argument --repeats: must be at least 1, got 0'),
        (['--threads', '0'], 'error: argument --threads: must be at least 1, got 0'),
        (['--dtypes', 'float64'], "invalid choice: 'float64'"),
    ],
)
def test_bad_options(argv, message, capsys):
    with pytest.raises(SystemExit) as caught:
        run_tool('benchmark_norm', *argv)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_ratio_is_the_median_over_rounds():
    """Rounds slowed as a whole tell of the machine; a ratio of medians would say 2."""
    rows = rows_of({'bn': [1, 10, 10], 'ubn': [20, 20, 5]})
    row = find(rows, norm='ubn', what='both')
    assert float(row['ratio_bn']) == 2
    rows = rows_of({'bn': [1, 10, 100], 'ubn': [1.2, 12, 90]})
    row = find(rows, norm='ubn', what='both')
    assert float(row['ratio_bn']) == pytest.approx(1.2)
    assert float(row['median_ms']) == pytest.approx(12)
    assert float(row['p90_ms']) == pytest.approx(12 + 0.8 * 78)
    assert row['ratio_literal'] == ''


def test_goals():
    cpu = [
        *rows_of({'ubn': [1.0], 'literal': [2.0]}),
        *rows_of({'ubn': [0.9], 'literal': [1.0]}, shape='8,3,8,8'),
    ]
    assert goals(cpu) == [
        'MISSED    0.9000 <= 0.85  time of a layer, x literal, worst of 2 (1 reach it)',
        'MISSED    0.6708 <= 0.6  time of a layer, x literal, mean of 2',
    ]
    assert 'MISSED: time of a layer, x literal' in table(cpu[6:])
    assert 'MISSED' not in table(cpu[:6])
    cuda = rows_of({'bn': [1.0], 'ubn': [1.2], 'literal': [4.0]}, device='cuda: Y')
    assert goals(cuda) == [
        'reached   1.2000 <= 1.3  time of a layer, x bn, worst of 1 (1 reach it)',
        'reached   0.3000 <= 0.3333  time of a layer, x literal, worst of 1 (1 reach it)',
    ]


def test_total_of_resnet50_weighs_shapes_by_their_layers():
    assert sum(RESNET50_LAYERS.values()) == 53
    rows = []
    for channels, side in RESNET50_LAYERS:
        times = {'bn': [1.0], 'ubn': [3.0 if side == 14 else 1.0]}
        rows += rows_of(times, shape=f'256,{channels},{side},{side}')
    total = 53 + 2 * 19  # 11 + 7 + 1 layers at 14 x 14
    assert resnet50_totals(rows) == [
        '53 norm layers of ResNet-50, float32 contiguous bn: 53 ms, 1.000 x bn',
        f'53 norm layers of ResNet-50, float32 contiguous ubn: {total} ms, {total / 53:.3f} x bn',
    ]
    assert resnet50_totals(rows[6:]) == []


@pytest.mark.newer_torch('autocast on a CPU takes bfloat16 alone, even where it is switched off')
def test_model(bench):
    rows = bench(
        *('--device', 'cpu', '--model', 'resnet50', '--shapes', '2,3,32,32', '--repeats', '1'),
        *('--norms', 'bn', 'ubn'),
    )
    assert [row['what'] for row in rows] == ['forward', 'backward', 'update', 'step'] * 2
    assert {row['model'] for row in rows} == {'resnet50'}
    step = find(rows, norm='ubn', what='step')
    parts = [float(row['median_ms']) for row in rows if row['norm'] == 'ubn'][:3]
    assert float(step['median_ms']) == pytest.approx(sum(parts), rel=1e-3)
    assert 1 < float(step['saved_ratio_bn']) < 2


def test_similarity(bench, monkeypatch, capsys):
    monkeypatch.setattr(norm, 'SIMILARITY_NUMBERS', 4096)
    rows = bench('--similarity', '--device', 'cpu', '--repeats', '2')
    assert [row['shape'] for row in rows if row['norm'] == 'ubn'] == [
        f'{n},{4096 // n}' for n in (8, 16, 32, 64, 128, 256, 512, 1024)
    ]
    assert {row['what'] for row in rows} == {'similarity'}
    assert 'slowest N by fastest' in capsys.readouterr().out


def test_the_similarity_is_compared_within_a_dtype():
    rows = []
    for dtype, times in (('float32', (10, 11)), ('bfloat16', (4, 6))):
        for number, ms in enumerate(times):
            row = dict.fromkeys(COLUMNS, '')
            row.update(what='similarity', norm='ubn', dtype=dtype, shape=f'{number}', device='gpu')
            rows.append({**row, 'median_ms': str(ms)})
    assert goals(rows)[-1].startswith('reached   1.5000 <= 2 ')


def test_the_commit_is_that_of_the_checkout(tmp_path, monkeypatch):
    def git(*command):
        author = ['-c', 'user.name=a', '-c', 'user.email=a@b']
        subprocess.run(['git', *author, *command], cwd=tmp_path, check=True, capture_output=True)

    git('init')
    git('commit', '--allow-empty', '--message', 'of somebody else')
    monkeypatch.setattr(benchmark_rows, 'ROOT', tmp_path)
    assert len(benchmark_rows._commit()) >= 7
    assert benchmark_rows._commit() != 'unknown'
    (tmp_path / 'packages').mkdir()
    monkeypatch.setattr(benchmark_rows, 'ROOT', tmp_path / 'packages')
    assert benchmark_rows._commit() == 'unknown'


def test_plot_holds_the_ratios(tmp_path):
    rows = [
        *rows_of({'bn': [1.0], 'ubn': [1.5], 'rbn': [1.25]}),
        *rows_of({'bn': [1.0], 'ubn': [1.75]}, shape='8,3,8,8'),
    ]
    path = tmp_path / 'rows.csv'
    other_run = [{**row, 'date': '2025-01-01T00:00:00'} for row in rows]
    append_csv(path, other_run, COLUMNS)
    append_csv(path, rows, COLUMNS)
    picture = tmp_path / 'ratios.png'
    run_tool('benchmark_norm', '--plot-only', '--csv', path, '--plot', picture)
    assert picture.is_file()
    axes = draw_ratios(read_last_run(path)).axes[0]
    points = {c.get_label(): c.get_offsets().tolist() for c in axes.collections}
    assert points == {'ubn': [[1.5, 0], [1.75, 1]], 'rbn': [[1.25, 0]]}


def test_plot_has_every_norm():
    assert len(set(MARKERS)) >= len(NORMS)


@pytest.mark.parametrize(
    ('content', 'reason'),
    [(None, 'no such file'), ('', 'holds no rows yet'), ('rows', 'nothing to plot: no row has')],
)
def test_nothing_to_plot(tmp_path, monkeypatch, capsys, content, reason):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        append_csv(Path('rows.csv'), rows_of({'bn': [1.0]}) if content else [], COLUMNS)
    with pytest.raises(SystemExit, match='1'):
        run_tool('benchmark_norm', '--plot-only', '--csv', 'rows.csv', '--plot', 'ratios.png')
    start = 'error: ' if content else 'error: rows.csv: '
    assert capsys.readouterr().err.startswith(start + reason)


def test_a_model_without_torchvision(bench, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'torchvision', None)
    with pytest.raises(SystemExit, match='1'):
        bench('--device', 'cpu', '--model', 'resnet50', '--dtypes', 'float32', 'bfloat16')
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith('error: --model resnet50 needs torchvision: ')


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    rows = rows_of({'bn': [1.0], 'ubn': [1.5]})
    with pytest.raises(CommandError, match='a plot needs matplotlib: pip install matplotlib'):
        plot(rows, 'ratios.png')


def test_a_checkout_that_is_not_installed_with_torch_alone(tmp_path):
    for folder in ('mmubn', 'tools'):
        ignore = shutil.ignore_patterns('__pycache__', '.mim')
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignore)
    (tmp_path / 'mmubn' / 'version.py').write_text("__version__ = 'not installed'\n")
    tool = tmp_path / 'tools' / 'benchmark_norm.py'
    absent = ('matplotlib', 'torchvision', 'mmengine', 'mmcv', 'mmdet', 'mmpretrain')
    blocked = f'import runpy, sys; sys.modules.update(dict.fromkeys({absent}))'
    start = f"runpy.run_path({str(tool)!r}, run_name='__main__')"
    argv = [*TINY, '--norms', 'bn', 'ubn', '--csv', str(tmp_path / 'rows.csv')]
    command = [sys.executable, '-c', f'{blocked}; {start}', *argv]
    env = {**os.environ, 'PYTHONPATH': str(tmp_path)}
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True, env=env)
    rows = read_csv(tmp_path / 'rows.csv')
    assert {row['mmubn'] for row in rows} == {'not installed'}
    assert {row['commit'] for row in rows} == {'unknown'}

"""The pictures hold the numbers of the tables and need no colour."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from tool import run_tool

from mmubn import plot_condensation
from mmubn.runs import COLUMNS

SIMILARITY = {'stem': [0.1, 0.2, 0.4], 'layer1': [0.5, 0.6, '']}
GATE = {'stem': [0.5, 0.0], 'layer1': [1.0, 1.0]}


def write_run(folder, kind, by_epoch=True):
    folder.mkdir()
    with (folder / 'condensation.csv').open('w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for time in range(3):
            start = time * by_epoch, 10 * time
            for layer, similarities in SIMILARITY.items():
                if time:
                    gate = GATE[layer][time - 1] if kind == 'UBN' else ''
                    writer.writerow([*start, layer, kind, 'train/input', 0.9, '', gate])
                row = [layer, kind, 'fixed/input', similarities[time], '', '']
                writer.writerow([*start, *row])
    return folder


def write_scalars(folder, stamp, lines):
    logs = folder / stamp / 'vis_data'
    logs.mkdir(parents=True)
    (logs / 'scalars.json').write_text(''.join(json.dumps(line) + '\n' for line in lines))


@pytest.fixture
def runs(tmp_path):
    """A BN and a UBN run, the second of the better accuracy."""
    bn, ubn = write_run(tmp_path / 'bn', 'BatchNorm2d'), write_run(tmp_path / 'ubn', 'UBN')
    train = {'lr': 0.1, 'loss': 1.0, 'epoch': 1, 'step': 10}
    condensation = {'condensation/all/fixed/input': 0.4, 'step': 10}
    for folder, gain in ((bn, 0.0), (ubn, 5.0)):
        metrics = [{'accuracy/top1': e * 10 + gain, 'time': 0.1, 'step': e} for e in (1, 2)]
        write_scalars(folder, '20260101_000000', [train, condensation, *metrics])
    return [bn, ubn]


def test_pictures_of_two_runs(runs, tmp_path, drawn):
    out = tmp_path / 'pictures'
    run_tool('plot_condensation', *map(str, runs), '--out', str(out))
    assert {path.name for path in out.iterdir()} == set(drawn)
    assert set(drawn) == {
        f'condensation_{name}.{kind}'
        for name in ('curves', 'gates', 'layers')
        for kind in ('png', 'svg')
    }
    panels = drawn['condensation_layers.png'].axes[:2]
    assert [panel.get_title() for panel in panels] == ['bn', 'ubn']


def test_curves_are_means_over_layers_under_the_accuracy(runs):
    bn, ubn = map(plot_condensation.Run, runs)
    figure = plot_condensation.draw_curves(
        [bn, ubn], 'fixed/input', 0.3, plot_condensation.choose_metric([bn, ubn])
    )
    above, below = figure.axes
    assert [line.get_xydata().tolist() for line in above.lines] == [
        [[1, 10], [2, 20]],
        [[1, 15], [2, 25]],
    ]
    assert above.get_ylabel() == 'accuracy/top1'
    # The second layer has no value at the last time.
    expected = [[0, 0.3], [1, 0.4], [2, 0.4]]
    assert below.lines[0].get_xydata() == pytest.approx(np.array(expected))
    assert [text.get_text() for text in above.get_legend().get_texts()] == ['bn', 'ubn']


def test_runs_differ_without_colour(runs):
    figure = plot_condensation.draw_curves(
        [plot_condensation.Run(folder) for folder in runs * 4], 'fixed/input', 0.3, None
    )
    lines = figure.axes[0].lines[:8]
    assert len({(line.get_linestyle(), line.get_marker()) for line in lines}) == 8
    for line in lines:
        assert len(set(to_rgb(line.get_color()))) == 1


def test_heat_map_holds_the_table_and_marks_the_condensed(runs):
    figure = plot_condensation.draw_layers(
        [plot_condensation.Run(folder) for folder in runs], 'fixed/input', 0.3
    )
    panel = figure.axes[0]
    image = panel.images[0]
    assert image.get_array().filled(-1).tolist() == [[0.1, 0.2, 0.4], [0.5, 0.6, -1]]
    assert image.get_cmap().name == 'gray_r'
    assert [label.get_text() for label in panel.get_yticklabels()] == ['stem', 'layer1']
    dots = {(x, y) for x, y in panel.collections[0].get_offsets().tolist()}
    assert dots == {(2, 0), (0, 1), (1, 1)}


def test_gates(runs):
    figure = plot_condensation.draw_gates([plot_condensation.Run(runs[1])])
    above, panel = figure.axes[:2]
    assert above.lines[0].get_xydata().tolist() == [[1, 0.75], [2, 0.5]]
    assert panel.images[0].get_array().tolist() == [[0.5, 0.0], [1.0, 1.0]]


def test_runs_of_one_name_are_told_apart_by_their_path(tmp_path):
    folders = []
    for parent in ('first', 'second'):
        (tmp_path / parent).mkdir()
        folders.append(write_run(tmp_path / parent / 'run', 'UBN'))
    run_tool('plot_condensation', *map(str, folders), '--out', str(tmp_path))
    text = (tmp_path / 'condensation_gates.svg').read_text()
    assert all(str(folder) in text for folder in folders)


def test_names_are_drawn_as_they_stand(tmp_path, drawn):
    names = ['_bn', 'lr$a_$b']
    folders = [write_run(tmp_path / name, 'UBN') for name in names]
    run_tool('plot_condensation', *map(str, folders))
    legend = drawn['condensation_curves.png'].axes[0].get_legend()
    shown = [text.get_text().strip().replace('\\', '') for text in legend.get_texts()]
    assert shown == names


def test_no_gates_no_picture_and_default_folder(runs, capsys):
    run_tool('plot_condensation', str(runs[0]))
    assert 'No gates to draw' in capsys.readouterr().out
    names = {path.name for path in runs[0].glob('*.svg')}
    assert names == {'condensation_curves.svg', 'condensation_layers.svg'}


def test_iteration_based_run_is_drawn_over_iterations(tmp_path):
    run = plot_condensation.Run(write_run(tmp_path / 'run', 'BatchNorm2d', by_epoch=False))
    figure = plot_condensation.draw_curves([run], 'fixed/input', 0.3, None)
    assert figure.axes[0].get_xlabel() == 'iteration'
    assert figure.axes[0].lines[0].get_xdata().tolist() == [0, 10, 20]


def test_runs_of_both_kinds_of_loop_share_no_axis(runs, tmp_path, capsys):
    iterations = write_run(tmp_path / 'iterations', 'UBN', by_epoch=False)
    expected = f'{runs[0]} counts epochs and {iterations} iterations: draw them in two calls'
    with pytest.raises(SystemExit, match='1'):
        run_tool('plot_condensation', iterations, runs[0], '--out', tmp_path)
    assert capsys.readouterr().err == f'error: {expected}\n'
    assert not list(tmp_path.glob('*.png'))


def test_a_run_killed_in_its_first_epoch_is_drawn_beside_another(runs):
    begun, whole = runs
    lines = (begun / 'condensation.csv').read_text().splitlines(keepends=True)
    (begun / 'condensation.csv').write_text(''.join(lines[:3]))
    shown = [plot_condensation.Run(folder) for folder in (begun, whole)]
    figure = plot_condensation.draw_curves(shown, 'fixed/input', 0.3, None)
    assert figure.axes[0].get_xlabel() == 'epoch'
    assert [line.get_xdata().tolist() for line in figure.axes[0].lines[:2]] == [[0], [0, 1, 2]]


def test_a_killed_run_is_drawn(runs):
    """Cut in the middle of a number, of a name and of a line of the log."""
    bn, ubn = runs
    table = (ubn / 'condensation.csv').read_text()
    (ubn / 'condensation.csv').write_text(table + '3,30,stem,UBN,fixed/input,0.')
    for log in bn.glob('*/vis_data/scalars.json'):
        log.write_text(log.read_text() + '{"accuracy/top1": 3')
    run_tool('plot_condensation', str(bn), str(ubn))
    assert plot_condensation.Run(ubn).table('fixed/input').times == [0, 1, 2]


def test_a_table_is_drawn_as_its_work_dir(runs, monkeypatch, capsys):
    """A table that was put aside is drawn too, without the accuracy of the training after it."""
    monkeypatch.chdir(runs[0].parent)
    table = Path('bn/condensation.csv')
    run = plot_condensation.Run(table)
    assert (run.name, run.metrics) == ('bn', plot_condensation.Run(runs[0]).metrics)
    assert run.metrics
    aside = table.with_name('condensation_20260101_000000.csv')
    aside.write_text(table.read_text())
    assert plot_condensation.Run(aside).metrics == {}
    run_tool('plot_condensation', table, aside)
    picture = Path('bn/condensation_curves.svg')
    assert str(picture) in capsys.readouterr().out
    assert all(str(path) in picture.read_text() for path in (table, aside))


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (['nowhere'], r'nowhere: no such file; train with custom_hooks=\[dict\(type='),
        (['.'], 'condensation.csv: no such file; train with custom_hooks='),
        (['bn', '--metric', 'mAP'], '--metric mAP is in no log; there is accuracy/top1$'),
        (
            ['bn', '--where', 'train/output'],
            'bn/condensation.csv: no rows of --where train/output; it has fixed/input, train/input',
        ),
        (['bn', '--out', 'file'], r'--out: cannot write to .*/file \(Not a'),
        (['file'], 'file is no condensation table: its first line'),
        (['begun.csv'], 'begun.csv: holds no record yet'),
    ],
)
def test_errors_name_the_file_and_the_option(runs, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(runs[0].parent)
    Path('file').write_text('epoch,loss\n')
    Path('begun.csv').write_text(','.join(COLUMNS) + '\n')
    with pytest.raises(SystemExit, match='1'):
        run_tool('plot_condensation', *argv)
    assert re.match(f'error: {message}', capsys.readouterr().err)

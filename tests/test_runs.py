"""Reading a work directory as a kill, a move or a second training leaves it."""

import json
import os

import pytest

from mmubn.runs import COLUMNS, checkpoints, last_checkpoint, read_condensation, read_scalars

HEADER = ','.join(COLUMNS) + '\r\n'
ROW = '1,10,stem,UBN,train/input,0.25,0.5,1\r\n'


# --- Scalars.


def log(folder, stamp, lines, config=None):
    place = folder / stamp / 'vis_data'
    place.mkdir(parents=True)
    text = ''.join(line if isinstance(line, str) else json.dumps(line) + '\n' for line in lines)
    (place / 'scalars.json').write_text(text)
    if config is not None:
        (place / 'config.py').write_text(config)


def train(step, **more):
    return {'lr': 0.1, 'loss': 1.0, 'step': step, **more}


def val(step, value):
    return {'accuracy/top1': value, 'time': 0.1, 'data_time': 0.1, 'step': step}


def steps(scalars):
    return [line['step'] for line in scalars.train]


def test_every_byte_of_a_log_may_be_the_last(tmp_path):
    lines = [train(10), val(1, 50.0), train(20), val(2, 60.0)]
    whole = ''.join(json.dumps(line) + '\n' for line in lines)
    found = set()
    for size in range(len(whole) + 1):
        folder = tmp_path / str(size)
        log(folder, '20260101_000000', [whole[:size]])
        scalars = read_scalars(folder)
        found.add((tuple(steps(scalars)), tuple(scalars.metrics.get('accuracy/top1', {}).items())))
    # Whole lines, and never a part of a number.
    one, two = ((1, 50.0),), ((1, 50.0), (2, 60.0))
    assert found == {((), ()), ((10,), ()), ((10,), one), ((10, 20), one), ((10, 20), two)}


def test_what_is_no_line_is_passed_over(tmp_path):
    broken = ['\0\0\0\n', '3\n', '[1]\n', '{"lr": 0.1}\n', '{"step": "x"}\n', '\n', '{"cut": 1.']
    log(tmp_path, '20260101_000000', [train(10), *broken])
    log(tmp_path, 'backup', [train(99)])
    assert steps(read_scalars(tmp_path)) == [10]


def test_a_resumed_training_replaces_what_it_repeats(tmp_path):
    first = [train(10), val(1, 1.0), train(25), val(2, 2.0), train(40), val(3, 3.0), train(55)]
    log(tmp_path, '20260101_000000', first)
    # From the checkpoint of epoch 2, and killed before it validated.
    log(tmp_path, '20260101_000001', [train(40, loss=9.0)], 'resume = True\nlr = 1\n')
    scalars = read_scalars(tmp_path)
    assert steps(scalars) == [10, 25, 40]
    assert scalars.train[-1]['loss'] == 9.0
    assert scalars.metrics == {'accuracy/top1': {1: 1.0, 2: 2.0}}


def test_a_training_that_started_anew_replaces_all(tmp_path):
    log(tmp_path, '20260101_000000', [train(5), train(10), val(1, 1.0), train(20), val(2, 2.0)])
    log(tmp_path, '20260101_000001', [train(10), val(1, 7.0)], 'lr = 1\n')
    log(tmp_path, '20260101_000002', [], 'lr = 1\n')  # died before its first line
    scalars = read_scalars(tmp_path)
    assert steps(scalars) == [10]
    assert scalars.metrics == {'accuracy/top1': {1: 7.0}}


def test_a_start_by_mistake_between_a_training_and_its_resumption(tmp_path):
    again = 'resume = True\n'
    log(tmp_path, '20260101_000000', [train(10), train(20), val(1, 1.0), train(35)], 'lr = 1\n')
    log(tmp_path, '20260101_000001', [train(10, loss=7.0)], 'lr = 1\n')  # without --resume
    log(tmp_path, '20260101_000002', [train(30), train(40), val(2, 2.0)], again)
    scalars = read_scalars(tmp_path)
    assert steps(scalars) == [10, 20, 30, 40]
    assert scalars.train[0]['loss'] == 1.0
    assert scalars.metrics == {'accuracy/top1': {1: 1.0, 2: 2.0}}
    # One that reached a checkpoint of its own was meant.
    log(tmp_path, '20260101_000003', [train(10, loss=9.0), val(1, 3.0), train(25)], 'lr = 1\n')
    log(tmp_path, '20260101_000004', [train(30), val(2, 4.0)], again)
    scalars = read_scalars(tmp_path)
    assert steps(scalars) == [10, 25, 30]
    assert scalars.metrics == {'accuracy/top1': {1: 3.0, 2: 4.0}}


ITERATIONS = "train_cfg = dict(\n    max_iters=40, type='IterBasedTrainLoop')\nx = 1\n"
EPOCHS = 'train_cfg = dict(\n    dynamic_intervals=[\n        (2, 1),\n    ], max_epochs=3)\n'


def test_validations_of_an_iteration_based_loop_keep_their_places(tmp_path):
    """By default mmengine writes step 0 for each, and epoch 1 beside all training."""
    lines = [train(10, epoch=1), val(0, 1.0), train(20, epoch=1), val(0, 2.0), train(25, epoch=1)]
    log(tmp_path, '20260101_000000', [val(0, 0.5), *lines, val(0, 2.5)], ITERATIONS)
    assert read_scalars(tmp_path).metrics['accuracy/top1'] == {0: 0.5, 10: 1.0, 20: 2.0, 25: 2.5}
    # Resumed from iteration 20.
    log(tmp_path, '20260101_000001', [train(25), train(30), val(0, 3.0)], 'resume = True\n')
    assert read_scalars(tmp_path).metrics['accuracy/top1'] == {0: 0.5, 10: 1.0, 20: 2.0, 30: 3.0}


def test_validations_between_two_lines_of_training_stand_at_the_records_of_the_hook(tmp_path):
    def record(step):
        return {'condensation/all/fixed/input': 0.3, 'step': step}

    lines = [record(0), train(10), record(14), val(0, 1.0), record(18), val(0, 2.0), train(20)]
    log(tmp_path, '20260101_000000', lines, ITERATIONS)
    scalars = read_scalars(tmp_path)
    assert scalars.metrics == {'accuracy/top1': {14: 1.0, 18: 2.0}}
    assert steps(scalars) == [10, 20]


@pytest.mark.parametrize('interval', [1, 4])
def test_epochs_of_metrics_that_were_logged_by_iteration(tmp_path, interval):
    lines = []
    for epoch in (1, 2, 3):
        lines += [train(s, epoch=epoch) for s in range(4 * epoch - 3, 4 * epoch + 1, interval)]
        lines.append(val(4 * epoch, 10.0 * epoch))
    log(tmp_path / 'epochs', '20260101_000000', lines, EPOCHS)
    expected = {1: 10.0, 2: 20.0, 3: 30.0}
    assert read_scalars(tmp_path / 'epochs').metrics['accuracy/top1'] == expected
    # In an iteration-based loop they are right as they are.
    lines = [{**line, 'epoch': 1} if 'lr' in line else line for line in lines]
    log(tmp_path / 'iterations', '20260101_000000', lines, ITERATIONS + 'max_epochs=3\n')
    expected = {4: 10.0, 8: 20.0, 12: 30.0}
    assert read_scalars(tmp_path / 'iterations').metrics['accuracy/top1'] == expected


# --- Condensation.


def table(folder, text):
    (folder / 'condensation.csv').write_bytes(text.encode())
    return read_condensation(folder)


def test_rows_are_typed(tmp_path):
    (row,) = table(tmp_path, HEADER + ROW)
    values = (1, 10, 'stem', 'UBN', 'train/input', 0.25, 0.5, 1.0)
    assert row == dict(zip(COLUMNS, values))
    assert table(tmp_path, '\ufeff' + HEADER + ROW) == [row]  # as spreadsheets save it
    (row,) = table(tmp_path, HEADER + '0,0,a,BatchNorm2d,fixed/input,,,\n')
    assert row['similarity'] is None
    assert row['batch_statistics_used'] is None


def test_every_byte_of_a_table_may_be_the_last(tmp_path):
    text = HEADER + ROW + ROW.replace('0.25', '0.125')
    expected = {row['similarity'] for row in table(tmp_path, text)}
    for size in range(len(text) + 1):
        found = [row['similarity'] for row in table(tmp_path, text[:size])]
        assert set(found) <= expected, text[:size]
    assert found == [0.25, 0.125]


@pytest.mark.parametrize(
    'line',
    [
        '1,10,st\0\0\0\0\0\0\r\n',
        '\0\0' + ROW,
        '2,20,stem,UB' + ROW,  # cut short, and written on
        'x,10,stem,UBN,train/input,0.25,,\r\n',
        '1,10,stem,UBN,train/input,0.2.5,,\r\n',
        '1,10,stem,UBN,train/inp,0.25,,\r\n',
        '\r\n',
    ],
)
def test_broken_lines_are_passed_over(tmp_path, line):
    assert len(table(tmp_path, HEADER + ROW + line + ROW)) == 2


def test_columns_of_other_versions(tmp_path):
    old = 'layer,epoch,iter,where,similarity,more\r\nstem,1,10,fixed/input,0.5,x\r\n'
    (row,) = table(tmp_path, old)
    assert (row['layer'], row['similarity'], row['running_similarity']) == ('stem', 0.5, None)
    with pytest.raises(ValueError, match=r'condensation.csv is no condensation table'):
        table(tmp_path, 'a,b\n1,2\n')


# --- Checkpoints.


@pytest.fixture
def work_dir(tmp_path):
    folder = tmp_path / 'run'
    folder.mkdir()
    for number, name in enumerate(('epoch_9', 'epoch_10', 'epoch_11', 'best_top1_epoch_9', 'net')):
        path = folder / f'{name}.pth'
        path.touch()
        os.utime(path, (number, number))
    return folder


def names(folder):
    return [path.name for path in checkpoints(folder)]


@pytest.mark.parametrize(
    'written', ['run/epoch_10.pth', '/gone/run/epoch_10.pth', 'C:\\runs\\epoch_10.pth\n']
)
def test_the_checkpoint_in_the_work_dir_itself_is_the_last(work_dir, written, monkeypatch):
    monkeypatch.chdir(work_dir.parent)
    (work_dir / 'last_checkpoint').write_text(written)
    assert last_checkpoint(work_dir) == work_dir / 'epoch_10.pth'
    assert names(work_dir) == ['epoch_10.pth', 'epoch_9.pth', 'net.pth']


def test_what_is_no_file_is_no_checkpoint(work_dir):
    (work_dir / 'latest.pth').symlink_to('/gone/run/epoch_11.pth')
    (work_dir / 'folder.pth').mkdir()
    (work_dir / 'last_checkpoint').write_text('epoch_10.pth')
    assert names(work_dir) == ['epoch_10.pth', 'epoch_9.pth', 'net.pth']


def test_a_copy_does_not_go_on_from_the_original(work_dir, tmp_path):
    original = tmp_path / 'original'
    original.mkdir()
    (original / 'epoch_12.pth').touch()
    text = str(original / 'epoch_12.pth')
    (original / 'last_checkpoint').write_text(text)
    (work_dir / 'last_checkpoint').write_text(text)
    assert last_checkpoint(work_dir) == work_dir / 'epoch_12.pth'  # which is missing
    assert names(work_dir)[1:] == ['epoch_11.pth', 'epoch_10.pth', 'epoch_9.pth', 'net.pth']


def test_checkpoints_in_a_folder_of_their_own(work_dir, tmp_path):
    out = tmp_path / 'out'
    out.mkdir()
    for name in ('epoch_1.pth', 'epoch_2.pth'):
        (out / name).touch()
    (work_dir / 'last_checkpoint').write_text(str(out / 'epoch_2.pth'))
    assert checkpoints(work_dir) == [out / 'epoch_2.pth', out / 'epoch_1.pth']


@pytest.mark.parametrize('written', ['', '\n', '\0\0\0', '/there/run/epoch_1', '/there/ru'])
def test_a_note_cut_short_names_none(work_dir, written):
    (work_dir / 'last_checkpoint').write_text(written)
    assert last_checkpoint(work_dir) is None
    assert names(work_dir) == ['net.pth', 'epoch_11.pth', 'epoch_10.pth', 'epoch_9.pth']

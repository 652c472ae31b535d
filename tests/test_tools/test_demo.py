"""The summary of a demo that was killed, and what its tools say of bad input."""

import json
import re

import pytest
import torch
from tool import run_tool

from mmubn.runs import COLUMNS

ROWS = """1,6,stem,UBN,train/input,0.5,0.25,1
1,6,stem,UBN,fixed/input,0.75,0.25,
2,12,stem,UBN,train/input,0.5,0.125,0
2,12,stem,UBN,fixed/in"""


@pytest.fixture
def work_dir(tmp_path):
    meta = dict(experiment_name='demo_20260101_000000', time='20260101_000130', iter=12, seed=0)
    torch.save(dict(meta=meta), tmp_path / 'epoch_2.pth')
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_2.pth'))
    logs = tmp_path / 'test' / '20260101_000000'
    logs.mkdir(parents=True)
    names = [
        f'coco/{kind}_mAP{suffix}' for kind in ('bbox', 'segm') for suffix in ('', '_50', '_75')
    ]
    (logs / 'metrics.json').write_text(json.dumps(dict.fromkeys(names, 0.5)))
    (tmp_path / 'condensation.csv').write_text(','.join(COLUMNS) + '\n' + ROWS)
    return tmp_path


def test_rows_that_lack_are_left_out(work_dir, capsys):
    run_tool('demo', work_dir)
    lines = capsys.readouterr().out.splitlines()
    assert '12 iterations in 1.5 minutes, seed 0' in lines[1]
    (line,) = [line for line in lines if line.startswith('stem')]
    assert line.split() == ['stem', 'UBN', '-', '-', '0.12', '0.00']


@pytest.mark.parametrize('name', ['condensation.csv', 'test/20260101_000000/metrics.json'])
def test_a_file_cut_to_nothing_is_one_line(work_dir, fails, name):
    (work_dir / name).write_text('')
    line = fails('demo', work_dir)
    assert re.match(f'error: {work_dir}: .*: run `make demo` again$', line)


def test_before_make_demo(fails):
    assert fails('demo', 'none') == 'error: none/test: no evaluation; run `make demo` first'


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (['scenes', '--size', '8'], 'size must be at least 64, got 8'),
        (['.'], "'.' holds no scenes.json of such scenes, so it was not made here and is left "),
        (['mine.txt/scenes'], '[Errno 20] Not a directory: '),
    ],
)
def test_bad_input_of_make_scenes_is_one_line(tmp_path, fails, argv, message):
    (tmp_path / 'mine.txt').touch()
    assert fails('make_scenes', *argv).startswith(f'error: {message}')

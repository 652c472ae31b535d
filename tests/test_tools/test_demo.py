"""The summary of a demo that was killed."""

import json

import pytest
from tiny_project import load_tool

from mmubn.runs import COLUMNS

ROWS = """1,6,stem,UBN,train/input,0.5,0.25,1
1,6,stem,UBN,fixed/input,0.75,0.25,
2,12,stem,UBN,train/input,0.5,0.125,0
2,12,stem,UBN,fixed/in"""


@pytest.fixture
def work_dir(tmp_path, monkeypatch):
    tool = load_tool('demo')
    monkeypatch.setattr(tool, 'training_time', lambda folder: 'some minutes')
    logs = tmp_path / 'test' / '20260101_000000'
    logs.mkdir(parents=True)
    names = [
        f'coco/{kind}_mAP{suffix}' for kind in ('bbox', 'segm') for suffix in ('', '_50', '_75')
    ]
    (logs / 'metrics.json').write_text(json.dumps(dict.fromkeys(names, 0.5)))
    (tmp_path / 'condensation.csv').write_text(','.join(COLUMNS) + '\n' + ROWS)
    monkeypatch.setattr('sys.argv', ['demo.py', str(tmp_path)])
    return tool, tmp_path


def test_rows_that_lack_are_left_out(work_dir, capsys):
    tool, _ = work_dir
    tool.main()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith('stem')]
    assert line.split() == ['stem', 'UBN', '-', '-', '0.12', '0.00']


@pytest.mark.parametrize('name', ['condensation.csv', 'test/20260101_000000/metrics.json'])
def test_a_file_cut_to_nothing_is_one_line(work_dir, name):
    tool, folder = work_dir
    (folder / name).write_text('')
    with pytest.raises(SystemExit, match=r'^demo.py: .*: run `make demo` again$'):
        tool.main()

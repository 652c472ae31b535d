"""host_tables.csv: its values are those of the installed metafiles."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import yaml
from mmengine.utils import get_installed_path
from tool import ROOT, read_csv

from mmubn.reproduce.rows import HOST_TABLES, PAPER

METRICS = {
    'top1': 'Top 1 Accuracy',
    'top5': 'Top 5 Accuracy',
    'bbox_AP': 'box AP',
    'segm_AP': 'mask AP',
}
LINES = read_csv(HOST_TABLES)


def metafile(line: dict) -> dict:
    """The entry that a line names, of the installed package."""
    package, wanted = line['version'].split()
    try:
        installed = version(package)
    except PackageNotFoundError:
        installed = 'none'
    if installed != wanted:
        pytest.skip(f'the table is of {package} {wanted}, installed is {installed}')
    path = Path(get_installed_path(line['host'])) / '.mim' / 'configs' / line['metafile']
    (entry,) = (m for m in yaml.safe_load(path.read_text())['Models'] if m['Name'] == line['entry'])
    return entry


@pytest.mark.parametrize('line', LINES, ids=lambda line: f'{line["entry"]}-{line["metric"]}')
def test_value_is_the_metafiles(line):
    entry = metafile(line)
    assert entry['Config'] == f'configs/{line["config"]}'
    metrics = {k: v for result in entry['Results'] for k, v in result['Metrics'].items()}
    assert float(line['value']) == metrics[METRICS[line['metric']]]


def test_no_value_of_an_entry_is_missing():
    named = {}
    for line in LINES:
        named.setdefault(line['entry'], set()).add(METRICS[line['metric']])
    for line in LINES:
        results = metafile(line)['Results']
        assert named[line['entry']] == {name for result in results for name in result['Metrics']}


def test_the_documented_table_has_the_same_values():
    paper = {}
    for line in read_csv(PAPER):
        key = line['dataset'], line['model'], line['norm'], line['metric']
        paper.setdefault(key, float(line['value']))
    text = (ROOT / 'docs' / 'evidence.md').read_text()
    rows = [line.strip('| ').split(' | ') for line in text.splitlines() if line.startswith('| ')]
    found = {name: cells for name, *cells in rows if len(cells) == 3}
    expected: dict = {}
    for line in LINES:
        if line['metric'] != 'top5':
            key = line['dataset'], line['model']
            values = expected.setdefault(key, ([], [], []))
            for value, norm in zip(values, ('BN', 'UBN')):
                value.append(paper[(*key, norm, line['metric'])])
            values[2].append(float(line['value']))
    for (dataset, model), values in expected.items():
        start = _words(model if dataset == 'COCO' else f'{dataset} {model}')
        (cells,) = (c for name, c in found.items() if _words(name)[: len(start)] == start)
        assert [[float(v) for v in cell.split(' / ')] for cell in cells] == list(values), start


def _words(text: str) -> list:
    return text.replace(',', '').split()

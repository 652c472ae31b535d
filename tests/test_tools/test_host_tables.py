"""tools/host_tables.csv: its values are those of the installed metafiles."""

import csv
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import yaml
from mmengine.utils import get_installed_path
from tiny_project import ROOT

METRICS = {
    'top1': 'Top 1 Accuracy',
    'top5': 'Top 5 Accuracy',
    'bbox_AP': 'box AP',
    'segm_AP': 'mask AP',
}
with (ROOT / 'tools' / 'host_tables.csv').open(newline='') as file:
    LINES = list(csv.DictReader(file))


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

"""docs/deployment.md: its Python runs as it stands, in order, in an empty folder."""

import importlib.util
import re

import pytest
from tool import ROOT

PAGE = (ROOT / 'docs' / 'deployment.md').read_text(encoding='utf-8')
BLOCKS = dict(re.findall(r'<!-- run: (\w+) -->\n```python\n(.*?)```', PAGE, flags=re.DOTALL))
NEEDS = {
    'classifier': ('timm', 'onnx', 'onnxscript'),
    'runtimes': ('onnxruntime', 'openvino'),
    'detector': ('mmdet', 'onnx', 'onnxscript'),
    'mmdeploy': ('mmdet', 'mmdeploy', 'onnxruntime'),
}
SEQUENCES = [('classifier', 'runtimes'), ('detector',), ('detector', 'mmdeploy')]


def test_every_block_is_run():
    assert {name for names in SEQUENCES for name in names} == set(BLOCKS) == set(NEEDS)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('names', SEQUENCES, ids='-'.join)
def test_runs(names, tmp_path, monkeypatch):
    needs = [need for name in names for need in NEEDS[name]]
    absent = [need for need in needs if importlib.util.find_spec(need) is None]
    if absent:
        pytest.skip(f'{absent[0]} is not installed')
    (tmp_path / 'configs').symlink_to(ROOT / 'configs')
    monkeypatch.chdir(tmp_path)
    variables = {'__name__': 'page'}
    for name in names:
        exec(compile(BLOCKS[name], name, 'exec'), variables)


def test_the_benchmark_can_write_its_tables():
    assert PAGE.index('<!-- benchmark: begin -->') < PAGE.index('<!-- benchmark: end -->')

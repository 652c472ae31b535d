"""The benchmark of inference measures what it says, and writes it down."""

import pytest
from tool import read_csv, run_tool

from mmubn.benchmark.inference import COLUMNS, goals, write_docs

MARKS = '<!-- benchmark: begin -->\n<!-- benchmark: end -->'


def row(**values):
    first = dict(date='d', commit='c', device='cpu: X, 2 threads', torch='2', model='resnet18')
    return {**dict.fromkeys(COLUMNS, ''), **first, 'size': '64', 'rounds': '3', **values}


@pytest.mark.slow
def test_a_run(tmp_path, capsys):
    pytest.importorskip('onnxruntime')
    page = tmp_path / 'page.md'
    page.write_text(f'# Before\n\n{MARKS}\n\nAfter.\n')
    run_tool(
        'benchmark_inference',
        *('--model', 'resnet18', '--size', '32', '--batches', '1', '--repeats', '2'),
        *('--norms', 'bn', 'bn_folded', 'ubn_prepared', 'ubn_converted', 'bnet_prepared'),
        *('--runtimes', 'torch', 'onnxruntime', '--threads', '1'),
        *('--csv', tmp_path / 'rows.csv', '--docs', page),
    )
    rows = read_csv(tmp_path / 'rows.csv')
    assert [r['runtime'] for r in rows] == ['torch'] * 5 + ['onnxruntime'] * 5
    for r in rows:
        assert 0 < float(r['p10_ms']) <= float(r['median_ms']) <= float(r['p90_ms'])
        assert float(r['images_per_s']) == pytest.approx(1e3 / float(r['median_ms']), rel=1e-3)
        assert float(r['difference']) < 1e-4
    nodes = {r['norm']: int(r['onnx_nodes']) for r in rows if r['onnx_nodes']}
    # 20 convolutions, 17 activations, 8 sums, pooling, the classifier.
    assert nodes['bn_folded'] == nodes['ubn_converted'] == 49
    assert nodes['bnet_prepared'] == 49 + 20
    assert nodes['ubn_prepared'] == 49 + 7 * 20
    text = page.read_text()
    assert text.startswith('# Before\n\n<!-- benchmark: begin -->\nresnet18, 32×32 images, cpu: ')
    assert text.endswith('<!-- benchmark: end -->\n\nAfter.\n')
    assert '| `ubn_prepared` |' in text
    write_docs(page, [row(batch='1', norm='bn', runtime='torch', median_ms='7')])
    assert '| `bn` | 7 |' in page.read_text()
    assert 'ubn_prepared' not in page.read_text()
    assert 'nodes of the ONNX graph, ubn_prepared' in capsys.readouterr().out


def test_goals():
    rows = [
        row(norm='ubn_prepared', runtime='torch', batch='8', ratio_bn_folded='1.21'),
        row(norm='ubn_prepared', runtime='onnxruntime', ratio_bn_folded='1.25'),
        row(norm='ubn_prepared', runtime='openvino', ratio_bn_folded='9', onnx_nodes='400'),
        row(norm='ubn_converted', runtime='openvino', ratio_bn_folded='1.01'),
    ]
    assert [line.split()[0] for line in goals(rows)] == [
        *('MISSED', 'reached', 'reached', 'MISSED')
    ]


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (['--batches', '1', '0'], 'error: argument --batches: must be at least 1, got 0'),
        (['--size', '8'], 'error: --size begins at 32'),
        (['--norms', 'gn'], "invalid choice: 'gn'"),
        (['--docs', 'none.md'], 'error: none.md: there is no <!-- benchmark: begin -->'),
        (['--csv', 'other.csv/x.csv'], 'error: --csv: cannot write to '),
        (['--csv', 'other.csv'], 'error: other.csv: its columns are not those of this version'),
    ],
)
def test_bad_options(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'other.csv').write_text('norm,ms\n')
    with pytest.raises(SystemExit):
        run_tool('benchmark_inference', *argv)
    assert message in capsys.readouterr().err

"""tools/similarity_options.py: what it simulates is what the layer does; a short real run."""

import pytest
import torch
from tool import CONFIGS, read_csv, run_tool
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmubn.layers import UBN
from mmubn.ops import mean_cosine_similarity
from mmubn.similarity_options import compare, follow, record

CONFIG = CONFIGS / 'demo' / 'resnet18_ubn_shapes.py'
SMALL = [
    '--cfg-options',
    *('train_dataloader.batch_size=8', 'train_dataloader.dataset.count=48'),
    'train_dataloader.num_workers=0',
]


class Frozen(UBN):
    """Stays in evaluation, as under norm_eval."""

    def train(self, mode=True):
        return super().train(False)


@pytest.mark.parametrize('interval', [1, 3])
@pytest.mark.parametrize('stride', [1, 2])
def test_follows_as_the_layer(interval, stride):
    layer = UBN(4, fct_interval=interval, fct_stride=stride, fct_momentum=0.3)
    similarities, taus = [], []
    for step in range(8):
        x = torch.randn(8, 4, 6, 6) + step % 3
        layer(x)
        similarities.append(mean_cosine_similarity(x[:, :, ::stride, ::stride]))
        taus.append(layer.running_similarity.clone())
    followed = follow(torch.stack(similarities), 0.3, interval)
    torch.testing.assert_close(followed, torch.stack(taus))


def test_table_of_a_training(tmp_path, capsys):
    arguments = ['--iterations', '6', '--intervals', '1', '4', '--strides', '1', '4']
    arguments += ['--csv', tmp_path / 'table.csv', '--work-dir', tmp_path / 'run', *SMALL]
    run_tool('similarity_options', CONFIG, *arguments)
    rows = read_csv(tmp_path / 'table.csv')
    found = {(row['fct_interval'], row['fct_stride']): row for row in rows}
    assert set(found) == {('1', '1'), ('1', '4'), ('4', '1'), ('4', '4')}
    assert float(found['1', '1']['largest_difference']) == 0
    for setting in (('1', '4'), ('4', '1')):
        assert 0 < float(found[setting]['mean_difference']) < 0.5
    assert ' UBN layers, 6 steps of ' in capsys.readouterr().out


def test_a_training_of_the_config_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained = tmp_path / 'work_dirs' / 'resnet18_ubn_shapes'
    trained.mkdir(parents=True)
    (trained / 'last_checkpoint').write_text('epoch_2.pth')
    run_tool('similarity_options', CONFIG, '--iterations', '2', *SMALL)
    assert [path.name for path in trained.iterdir()] == ['last_checkpoint']
    run_tool('similarity_options', CONFIG, '--iterations', '2', '--work-dir', trained, *SMALL)
    assert (trained / 'last_checkpoint').read_text() == 'epoch_2.pth'
    assert not list(trained.rglob('*.pth'))


def test_checks_and_processes_as_the_command_line_says(tmp_path, capsys):
    argv = ['similarity_options', CONFIG, '--iterations', '1', '--work-dir', tmp_path, *SMALL]
    with pytest.raises(SystemExit):
        run_tool(*argv, 'optim_wrapper.optimizer.lr=-1')
    assert 'error: optim_wrapper.optimizer' in capsys.readouterr().err
    with pytest.raises(ValueError, match='Invalid learning rate'):
        run_tool(*argv, 'optim_wrapper.optimizer.lr=-1', '--skip-checks')
    with pytest.raises(SystemExit):
        run_tool(*argv, '--launcher', 'pytorch')
    assert 'error: --launcher: this tool measures in one process' in capsys.readouterr().err


def test_only_layers_that_measure_are_followed():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen, self.trained, self.no_gate = Frozen(4), UBN(4), UBN(4, fct=None)

        def forward(self, x):
            def by_name(x):
                return self.trained(input=x)

            return self.no_gate(checkpoint(by_name, self.frozen(x), use_reentrant=False))

    net = Net()
    layers, seen = record(net, [1])
    assert list(layers) == ['trained']
    for _ in range(3):
        net(torch.randn(4, 4, 6, 6)).sum().backward()  # runs the layer again
    assert len(seen['trained'][1]) == 3
    assert compare(layers, seen, [1], [1]) == [(1, 1, 0, 0, 0)]


@pytest.mark.parametrize(
    ('layer', 'message'),
    [(UBN(4, fct=None), 'no UBN layer has a gate'), (Frozen(4), 'all UBN layers have frozen')],
)
def test_nothing_to_follow_is_told_before_the_training(layer, message):
    with pytest.raises(ValueError, match=message):
        record(nn.Sequential(layer), [1])


@pytest.mark.parametrize('option', ['--iterations', '--intervals', '--strides'])
def test_counts(option, capsys):
    with pytest.raises(SystemExit):
        run_tool('similarity_options', 'tiny.py', option, '0')
    assert f'argument {option}: must be at least 1, got 0' in capsys.readouterr().err


def test_without_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        run_tool('similarity_options', CONFIGS / 'cifar10' / 'resnet18_small_cifar10.py')
    assert capsys.readouterr().err.startswith('error: train_dataloader.dataset.data_root: no ')
    assert not list(tmp_path.iterdir())


def test_a_config_without_ubn(tmp_path, capsys):
    arguments = [CONFIGS / 'demo' / 'resnet18_bn_shapes.py', '--work-dir', tmp_path]
    with pytest.raises(SystemExit):
        run_tool('similarity_options', *arguments)
    assert "no UBN layer to measure; set norm_cfg=dict(type='UBN')" in capsys.readouterr().err

"""The survey of similarities: its numbers, what it leaves alone, what it warns of."""

import copy
import csv
import math
import subprocess
import sys

import pytest
import torch
from torch import nn
from weights import assert_same_state

import mmubn
from mmubn.ops import mean_cosine_similarity
from mmubn.runs import COLUMNS
from mmubn.similarity_survey import THRESHOLDS, LayerSimilarity, SimilaritySurvey


class Net(nn.Module):
    """Two norm layers: the first sees the images, the second what is alike in all of them."""

    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.first, self.second = norm(3), norm(3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.second(self.drop(self.first(x)).abs() + 3)


def batches(count=4, images=8):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(images, 3, 6, 6, generator=generator) + 0.5 for _ in range(count)]


def test_values_are_those_of_the_batches():
    data = batches()
    first, second = mmubn.survey_similarity(Net(), [(x, None) for x in data]).layers
    expected = [mean_cosine_similarity(x).item() for x in data]
    assert first.similarity == pytest.approx(sum(expected) / 4)
    assert (first.lowest, first.highest) == pytest.approx((min(expected), max(expected)))
    assert first.layer == 'first'
    assert first.type == 'BatchNorm2d'
    assert second.similarity > 0.7


def test_a_layer_trains_with_the_gates_that_it_foresees():
    data = batches(60)
    survey = mmubn.survey_similarity(Net(), data, num_batches=60)
    low, high = (round(layer.similarity, 3) for layer in survey.layers)
    between = (low + high) / 2
    assert survey.shut(between) == ['first']
    model = Net(lambda channels: mmubn.UBN(channels, fct=between, fct_warmup=5))
    for x in data:
        model(x)
    assert not model.first.batch_statistics_used
    assert model.second.batch_statistics_used


@pytest.mark.parametrize('norm', [nn.BatchNorm2d, mmubn.UBN])
def test_the_model_and_the_random_numbers_stay_as_they_are(norm):
    model = Net(norm).eval()
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    mmubn.survey_similarity(model, batches())
    assert not any(module.training for module in model.modules())
    assert_same_state(model, before)
    assert all(not module._forward_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())


def test_as_many_batches_as_asked_for():
    data = iter(batches(5))
    assert '2 training batches' in str(mmubn.survey_similarity(Net(), data, num_batches=2))
    assert len(list(data)) == 3


def survey(*similarities):
    layers = [LayerSimilarity(f'n{i}', 'UBN', s, s, s) for i, s in enumerate(similarities)]
    return SimilaritySurvey(layers, 'by hand')


def test_table_and_counts():
    found = survey(0.02, 0.12, 0.2, 0.31, math.nan)
    assert [len(found.shut(t)) for t in THRESHOLDS] == [1, 1, 2, 3, 3, 3, 4, 4, 4, 4]
    assert found.most_shut_from == 0.2
    lines = str(found).splitlines()
    assert lines[3].split() == ['n0', '0.020', '0.020', '0.020', *'xxxxxxxxxx']
    assert lines[5].split() == ['n2', '0.200', '0.200', '0.200', *'...xxxxxxx']
    assert lines[7].split() == ['n4', '-', '-', '-', *'..........']
    assert lines[8].split() == ['shut,', 'of', '4', *'1123334444']
    assert lines[9].startswith('warning: from fct=0.2 on most gates would be shut (3 of 4)')
    assert lines[10] == (
        'warning: no similarity of 1 layers (not called, inside of torch.compile, or never with '
        'two finite images): n4, ...'
    )
    assert survey(0.9, 0.8).warnings() == []


def test_held_layers_are_told():
    class Held(Net):
        def train(self, mode=True):
            super().train(mode)
            self.first.eval()
            return self

    found = mmubn.survey_similarity(Held(), batches())
    assert found.held == 1
    assert found.warnings()[-1].startswith('1 of 2 layers are held in evaluation mode')


def test_bad_input():
    with pytest.raises(ValueError, match=r'no similarity in 4 batches: .* a batch needs two'):
        mmubn.survey_similarity(Net(), batches(images=1))
    with pytest.raises(ValueError, match='batches: there is none'):
        mmubn.survey_similarity(Net(), [])
    with pytest.raises(ValueError, match=r'^num_batches must be at least 1, got 0$'):
        mmubn.survey_similarity(Net(), batches(), num_batches=0)
    with pytest.raises(TypeError, match='a batch is of type dict, not images: pass forward='):
        mmubn.survey_similarity(Net(), [dict(image=torch.zeros(2, 3, 4, 4))])
    with pytest.raises(ValueError, match='Linear holds no batch norm to measure'):
        mmubn.survey_similarity(nn.Linear(3, 3), batches())


def test_a_compiled_model_is_the_one_that_was_compiled():
    torch.manual_seed(1)
    net = Net()
    torch.manual_seed(2)
    expected = mmubn.survey_similarity(net, batches())
    torch.manual_seed(2)
    found = mmubn.survey_similarity(torch.compile(net, backend='eager'), batches())
    assert str(found) == str(expected)


def test_nothing_seen_names_what_hides_a_layer():
    net = nn.Sequential(torch.compile(Net(), backend='eager'))
    with pytest.raises(ValueError, match=r'layers inside of torch.compile are not seen'):
        mmubn.survey_similarity(net, batches())
    spoilt = [torch.full((4, 3, 6, 6), float('nan'))]
    with pytest.raises(ValueError, match=r'a batch needs two, with finite features'):
        mmubn.survey_similarity(Net(), spoilt)


def test_own_forward():
    found = mmubn.survey_similarity(
        Net(),
        [dict(image=x) for x in batches()],
        forward=lambda model, batch: model(**forward(batch)),
    )
    assert found.layers == mmubn.survey_similarity(Net(), batches()).layers


def forward(batch):
    return dict(x=batch['image'])


def write_run(path, rows):
    with path.open('w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(rows)


def test_of_a_run(tmp_path):
    path = tmp_path / 'condensation.csv'
    rows = [(e, 10 * e, 'a', 'UBN', 'train/input', s, 0.5, 1) for e, s in ((1, 0.4), (2, 0.1))]
    rows += [(2, 20, 'a', 'UBN', 'train/output', 0.9, 0.5, 1)]
    rows += [(2, 20, 'a', 'UBN', 'fixed/input', 0.8, 0.5, '')]
    rows += [(2, 20, 'b', 'UBN', 'train/input', '', 1, '')]
    write_run(path, rows)
    found = mmubn.read_survey(path, thresholds=(0.3, 0.1))
    assert found.layers[0] == LayerSimilarity('a', 'UBN', 0.1, 0.1, 0.4)
    assert math.isnan(found.layers[1].similarity)
    assert found.thresholds == [0.1, 0.3]
    assert found.shut(0.1) == ['a']


def test_a_layer_without_a_value_in_the_last_epoch_has_none(tmp_path):
    path = tmp_path / 'condensation.csv'
    rows = [(1, 10, n, 'UBN', 'train/input', s, 1, 1) for n, s in (('a', 0.2), ('b', 0.02))]
    rows += [(2, 20, n, 'UBN', 'train/input', s, 1, 1) for n, s in (('a', 0.3), ('b', ''))]
    write_run(path, rows)
    found = mmubn.read_survey(path)
    assert found.layers[0] == LayerSimilarity('a', 'UBN', 0.3, 0.2, 0.3)
    layer = found.layers[1]
    assert math.isnan(layer.similarity)
    assert (layer.lowest, layer.highest) == (0.02, 0.02)
    assert found.shut(0.1) == []


def test_of_no_run(tmp_path):
    path = tmp_path / 'condensation.csv'
    write_run(path, [(0, 0, 'a', 'BN', 'fixed/input', 0.3, '', '')])
    with pytest.raises(ValueError, match='has no training batches yet'):
        mmubn.read_survey(path)


def test_picture_and_rows(tmp_path, drawn):
    found = survey(0.02, 0.12, 0.2)
    found.plot(tmp_path / 'picture.png')
    assert (tmp_path / 'picture.png').is_file()
    layers, gates = drawn['picture.png'].axes
    assert layers.lines[0].get_xdata() == pytest.approx([0.02, 0.12, 0.2])
    assert list(gates.lines[0].get_ydata()) == [len(found.shut(t)) for t in found.thresholds]
    row = found.to_list()[1]
    assert row['layer'] == 'n1'
    assert (row['shut_at_0.1'], row['shut_at_0.15']) == (False, True)


def test_needs_torch_alone():
    """And so does the recording of condensation, by which it measures."""
    code = """
import builtins, sys
real = builtins.__import__
def refuse(name, *args, **kwargs):
    if name.split('.')[0] in ('mmengine', 'mmcv', 'matplotlib', 'PIL'):
        raise ImportError(name)
    return real(name, *args, **kwargs)
builtins.__import__ = refuse
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == 'mmengine' else found(name, *a)
import torch, mmubn
model = torch.nn.Sequential(mmubn.UBN(3))
print(mmubn.survey_similarity(model, [torch.randn(4, 3, 8, 8)]))
"""
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert 'Sequential, 1 training batches' in out.stdout

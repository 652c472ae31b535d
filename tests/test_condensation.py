"""The recorder against pairwise cosines written out, and against what it must leave alone."""

import pytest
import torch
from against_reference import pairwise
from torch import nn
from torch.utils.checkpoint import checkpoint

import mmubn
from mmubn.condensation import CondensationRecorder


def small_net():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 6, 3),
        mmubn.UBN(6),
    )


def images(n=8):
    return torch.randn(n, 3, 10, 10) + 0.3


@pytest.mark.parametrize('training', [True, False])
def test_similarity_of_input_and_output(training):
    net, x = small_net().train(training), images()
    net[1].running_mean.fill_(0.5)
    net[4].running_mean.fill_(0.5)
    seen = {}
    for name in '14':
        net.get_submodule(name).register_forward_hook(
            # A copy, because the next layer works in place.
            lambda _, args, y, name=name: seen.update({name: (args[0].clone(), y.clone())})
        )
    with mmubn.record_condensation(net) as rec:
        net(x)
    assert list(rec.to_dict()) == ['1', '4']
    for name, values in rec.to_dict().items():
        assert values['input'] == pytest.approx(pairwise(seen[name][0]), abs=1e-6)
        assert values['output'] == pytest.approx(pairwise(seen[name][1]), abs=1e-6)
    assert abs(values['input'] - values['output']) > 0.01


def test_gate_of_ubn():
    net = nn.Sequential(mmubn.UBN(3, fct=0.9, fct_momentum=1.0, fct_warmup=1), nn.BatchNorm2d(3))
    with mmubn.record_condensation(net) as rec:
        for _ in range(4):  # batch statistics in the warm-up, running ones after it
            net(images())
    ubn, bn = rec.to_dict().values()
    assert ubn['type'] == 'UBN'
    assert ubn['batch_statistics_used'] == 0.25
    assert ubn['running_similarity'] == pytest.approx(float(net[0].running_similarity))
    assert bn == {**bn, 'batch_statistics_used': None, 'running_similarity': None}

    net.eval()
    with mmubn.record_condensation(net) as rec:
        net(images())
    assert rec.to_dict()['0']['batch_statistics_used'] is None


def test_the_state_is_on_the_cpu_whatever_the_default_device():
    net = small_net()
    with mmubn.record_condensation(net) as rec:
        net(images())
    expected = rec.to_dict()
    with torch.device('meta'):
        assert rec.to_dict() == expected


def test_rows_are_tidy():
    net = small_net()
    with mmubn.record_condensation(net, layers='4') as rec:
        net(images())
    rows = rec.to_list()
    values = rec.to_dict()['4']
    assert [(r['layer'], r['type'], r['where']) for r in rows] == [
        ('4', 'UBN', 'input'),
        ('4', 'UBN', 'output'),
    ]
    assert [r['similarity'] for r in rows] == [values['input'], values['output']]
    assert rows[0]['batch_statistics_used'] == 1.0


def test_calls_are_averaged_and_undefined_ones_left_out():
    norm = nn.BatchNorm2d(3)
    batches = images(), images() + 1, images(1), torch.full((4, 3, 2, 2), float('nan'))
    with mmubn.record_condensation(norm) as rec:
        for x in batches:
            norm(x)
    expected = (pairwise(batches[0]) + pairwise(batches[1])) / 2
    assert rec.to_dict()['']['input'] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize('norm', [nn.BatchNorm2d(3), mmubn.UBN(3)])
def test_input_given_by_keyword(norm):
    x = images()
    with mmubn.record_condensation(norm) as rec:
        norm(input=x)
    assert rec.to_dict()['']['input'] == pytest.approx(pairwise(x), abs=1e-6)


def test_layer_never_called_has_no_value():
    net = small_net()
    with mmubn.record_condensation(net) as rec:
        net[:2](images())
    assert rec.to_dict()['4']['input'] is None


@pytest.mark.parametrize('use_reentrant', [True, False])
def test_checkpointed_segment_counts_once(use_reentrant):
    net, x = small_net(), images().requires_grad_()
    with mmubn.record_condensation(net) as rec:
        checkpoint(net, x, use_reentrant=use_reentrant).square().sum().backward()
    assert rec.state()[:, 0, 1].tolist() == [1, 1]


def test_leaves_gradients_buffers_and_generator_alone():
    results = []
    for watch in (False, True):
        torch.manual_seed(0)
        net, x = small_net(), images().requires_grad_()
        if watch:
            with mmubn.record_condensation(net):
                y = net(x)
        else:
            y = net(x)
        (y * torch.randn_like(y)).sum().backward()
        state = [*net.state_dict().values(), *(p.grad for p in net.parameters()), x.grad, y]
        results.append([*state, torch.get_rng_state()])
        assert not any(m._forward_hooks for m in net.modules())
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_hooks_go_when_the_model_fails():
    net = small_net()
    with pytest.raises(RuntimeError), mmubn.record_condensation(net):
        net(torch.randn(2, 5, 10, 10))
    assert not any(m._forward_hooks for m in net.modules())


def test_state_adds_up_over_processes():
    net, batches = small_net(), (images(), images())
    states = []
    for x in batches:
        with mmubn.record_condensation(net) as rec:
            net(x)
        states.append(rec.state())
    both = rec.to_dict(states[0] + states[1])
    expected = (rec.to_dict(states[0])['1']['input'] + rec.to_dict(states[1])['1']['input']) / 2
    assert both['1']['input'] == pytest.approx(expected)


def test_errors_name_the_pattern_and_the_model():
    with pytest.raises(ValueError, match=r"layers='bn9' matches none of the 2 .* first .* '1'"):
        CondensationRecorder(small_net(), 'bn9')
    with pytest.raises(ValueError, match=r"^layers='\[' is no regular expression: untermin"):
        CondensationRecorder(small_net(), '[')
    with pytest.raises(ValueError, match=r"^layers=\['bn'\] is no regular expression: "):
        CondensationRecorder(small_net(), ['bn'])
    with pytest.raises(ValueError, match='Linear holds no batch norm'):
        CondensationRecorder(nn.Linear(2, 2))


def test_timm_model_with_fused_activation():
    timm = pytest.importorskip('timm')
    model = timm.create_model('efficientnet_lite0').eval()
    with mmubn.record_condensation(model) as rec:
        model(torch.randn(4, 3, 32, 32))
    values = rec.to_dict()['bn1']
    assert values['type'] == 'BatchNormAct2d'
    assert values['output'] > values['input']  # ReLU6 leaves one orthant

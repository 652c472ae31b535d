"""SyncUBN in 2 and 4 processes against one that has the whole batch."""

import copy
import functools
from unittest import mock

import pytest
import torch
from processes import LIMIT, Traffic, in_processes
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from mmubn.layers import UBN, SyncUBN
from mmubn.ops import reference
from mmubn.ops.torch_backend import TorchBackend

C = 4
# Images of each rank.
SPLITS = {
    'even': {2: (3, 3), 4: (2, 2, 2, 2)},
    'uneven': {2: (5, 2), 4: (1, 4, 2, 3)},
    'empty': {2: (5, 0), 4: (3, 0, 2, 0)},
}
SETTINGS = {
    'default': dict(),
    'no gate': dict(fct=None),
    'cumulative': dict(momentum=None, kernel_size=1),
    'no rectification': dict(center=False, scale=False),
    'no affine': dict(affine=False),
    'no running': dict(fct=None, track_running_stats=False),
    'precise': dict(momentum=1.0),
    'stride': dict(fct_stride=2),
}


def generator(*seeds):
    return torch.Generator().manual_seed(sum(s * 31**i for i, s in enumerate(seeds)))


@torch.no_grad()
def shaken(norm):
    """The layer with no parameter at its initial value."""
    for number, parameter in enumerate(norm.parameters()):
        parameter += 0.3 * torch.randn(parameter.shape, generator=generator(number))
    return norm


# --- What the processes do; every case returns what its test looks at.


def steps(rank, world):
    """Five training steps of two layers, for every split of the batch."""
    return {split: five_steps(sizes[world], rank) for split, sizes in SPLITS.items()}


def five_steps(sizes, rank=None, make=SyncUBN):
    """Those of one rank, or of all together; the gate of the first layer opens and shuts."""
    torch.manual_seed(0)
    settings = dict(fct_warmup=0, fct_momentum=0.97)
    net = nn.Sequential(shaken(make(3, **settings)), nn.Conv2d(3, C, 3), make(C, **settings))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    results = dict(y=[], dx=[], gates=[])
    for step in range(5):
        x, dy = whole_batch(sizes, step)
        if rank is not None:
            x, dy = (part.split(sizes)[rank] for part in (x, dy))
        x = x.clone().requires_grad_()
        optimizer.zero_grad()
        y = net(x)
        (y * dy).sum().backward()
        if rank is not None:
            for parameter in net.parameters():
                distributed.all_reduce(parameter.grad)
        optimizer.step()
        results['y'].append(y.detach())
        results['dx'].append(x.grad)
        results['gates'].append(bool(net[0].batch_statistics_used))
    return dict(results, state=net.state_dict())


def whole_batch(sizes, step):
    """An offset that opens the gate in steps 0, 2, 3, noise that shuts it in 1 and 4."""
    g = generator(sum(sizes), step)
    x = torch.randn(sum(sizes), 3, 7, 6, generator=g) + (0.0 if step in (1, 4) else 2.0)
    return x, torch.randn(sum(sizes), C, 5, 4, generator=g) / 20


def layer_inputs(world, dtype=torch.float32):
    """Batches of different numbers and sizes of images, one of four empty."""
    shapes = [(3, 6, 5), (2, 3, 8), (0, 4, 4), (1, 1, 1)]
    batches = []
    for rank in range(world):
        n, h, w = shapes[rank]
        x = torch.randn(n, C, h, w, generator=generator(rank, world), dtype=torch.float64)
        dy = torch.randn(x.shape, generator=generator(rank, world, 1), dtype=torch.float64)
        batches.append(((x * 2 + rank + 1).to(dtype), dy.to(dtype)))
    return batches


def sizes(rank, world):
    """One step of each setting on batches of different image sizes."""
    results = {}
    for name, settings in SETTINGS.items():
        norm = shaken(SyncUBN(C, **settings))
        x, dy = layer_inputs(world)[rank]
        x.requires_grad_()
        y = norm(x)
        (y * dy).sum().backward()
        for parameter in norm.parameters():
            distributed.all_reduce(parameter.grad)
        gradients = {key: p.grad for key, p in norm.named_parameters()}
        results[name] = dict(y=y.detach(), dx=x.grad, gradients=gradients, state=norm.state_dict())
    return results


def traffic(rank, world):
    """Collectives of a step, of one with the gate shut, and of evaluation."""
    norm = SyncUBN(C, fct_warmup=0, fct_momentum=1)
    counts = []
    for offset in (3, -0.5):
        x = (torch.rand(3, C, 5, 5) + offset).requires_grad_()
        with Traffic() as forward:
            y = norm(x)
        with Traffic() as backward:
            y.square().sum().backward()
        counts.append((forward.numbers, forward.calls, backward.numbers, backward.calls))
    gate = bool(norm.batch_statistics_used)
    norm.eval()
    with Traffic() as evaluation:
        norm(torch.rand(3, C, 5, 5, requires_grad=True)).sum().backward()
    return dict(counts=counts, gate=gate, evaluation=evaluation.calls)


def recomputed(rank, world):
    """A layer called twice in a checkpointed segment, and the same without checkpointing."""
    results = []
    for reentrant in (None, False, True):
        torch.manual_seed(0)
        norm = shaken(SyncUBN(C, fct_warmup=0, fct_momentum=0.5))
        conv = nn.Conv2d(C, C, 1)

        def segment(x, norm=norm, conv=conv):
            return norm(conv(norm(x)).relu())

        for step in range(3):
            x = torch.randn(3, C, 5, 5, generator=generator(rank, step)) + 1
            x.requires_grad_()
            y = segment(x) if reentrant is None else checkpoint(segment, x, use_reentrant=reentrant)
            (y * torch.randn(y.shape, generator=generator(step))).sum().backward()
        results.append([x.grad, norm.kernel.grad, conv.weight.grad, *norm.state_dict().values()])
    return results


def corners(rank, world):
    """Batches of nothing, of NaN on one rank, and of one value a channel on each."""
    norm = SyncUBN(C, fct_warmup=0)
    norm(torch.randn(3, C, 5, 5) + 1)
    results = dict(start=clone(norm))
    norm(torch.randn(0, C, 5, 5, requires_grad=True)).sum().backward()
    results['nothing'] = clone(norm)
    results['gradients'] = [p.grad for p in norm.parameters()]
    results['flat'] = norm(torch.randn(2, C, 0, 5)).shape
    x = torch.randn(3, C, 5, 5)
    x[0, 0, 0, 0] = float('nan') if rank == 1 else 0
    norm(x)
    results['nan'] = clone(norm)
    x = torch.full((1, C, 1, 1), float(rank), requires_grad=True)
    plain = SyncUBN(C, fct=None)
    results['single'] = plain(x).detach()
    results['single state'] = plain.state_dict()
    return results


def clone(norm):
    return {key: value.clone() for key, value in norm.state_dict().items()}


def groups(rank, world):
    """Groups of two processes, and groups of one."""
    pairs = [distributed.new_group([r, r + 1], timeout=LIMIT) for r in range(0, world, 2)]
    alone = [distributed.new_group([r], timeout=LIMIT) for r in range(world)]
    x = torch.randn(3, C, 5, 5, generator=generator(rank)) + rank
    results = {}
    for name, group in (('pair', pairs[rank // 2]), ('alone', alone[rank])):
        norm = SyncUBN(C, fct_warmup=0, process_group=group)
        twin = copy.deepcopy(norm)  # as EMA and prepare_for_inference make
        results[name] = dict(y=norm(x).detach(), state=norm.state_dict(), x=x)
        assert twin.process_group is group
        assert not any(norm.state_dict()[k].equal(v) for k, v in twin.named_buffers())
        assert torch.equal(twin(x), results[name]['y'])
        assert same_state([twin.state_dict(), norm.state_dict()])
    return results


def ddp(rank, world):
    """Steps under DistributedDataParallel, or of one process with the whole batch."""
    torch.manual_seed(0)
    layer = (
        functools.partial(Whole, SPLITS['even'][world], backend='torch')
        if rank is None
        else SyncUBN
    )
    net = nn.Sequential(layer(3), nn.Conv2d(3, C, 3), layer(C, fct_warmup=0))
    model = DistributedDataParallel(net, broadcast_buffers=False) if rank is not None else net
    for step in range(3):
        x, dy = whole_batch(SPLITS['even'][world], step)
        if rank is not None:
            x, dy = x.chunk(world)[rank], dy.chunk(world)[rank] * world  # DDP takes the mean
        model.zero_grad()
        (model(x) * dy).sum().backward()
    return dict(gradients={k: p.grad for k, p in net.named_parameters()}, state=net.state_dict())


def compiled(rank, world):
    """Gradients of a network, compiled and not, of which one process gets no images."""
    results = []
    for make in (lambda net: net, functools.partial(torch.compile, backend='aot_eager')):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, C, 1), shaken(SyncUBN(C)))
        model = make(net)
        for step, images in enumerate((3, 0 if rank == 1 else 3)):
            y = model(torch.randn(images, 3, 5, 5, generator=generator(rank, step)))
            (y * torch.randn(y.shape, generator=generator(step))).sum().backward()
        results.append([*(p.grad for p in net.parameters()), *net.state_dict().values()])
    return results


def derivatives(rank, world):
    """What each kind of derivative says that a collective does not have."""
    norm, x = SyncUBN(C, fct=None), torch.randn(3, C, 5, 5, generator=generator(rank))

    def y(x):
        # Copies that belong to the transform, else it refuses to move them.
        buffers = {name: buffer.clone() for name, buffer in norm.named_buffers()}
        return torch.func.functional_call(norm, buffers, (x,))

    def dx(dy, **kind):
        value = x.clone().requires_grad_()
        return torch.autograd.grad(norm(value), value, dy, **kind)

    told = []
    for derivative in (
        lambda: torch.func.grad(lambda x: y(x).square().sum())(x),
        lambda: torch.func.jvp(y, (x,), (x,)),
        lambda: torch.jit.trace(norm, (x,), check_trace=False),
        lambda: dx(x, create_graph=True),
        lambda: dx(torch.stack([x, x]), is_grads_batched=True),
    ):
        with pytest.raises(RuntimeError) as error:
            derivative()
        told.append(str(error.value))
    return told


CASES = (steps, sizes, traffic, recomputed, corners, groups, ddp, compiled, derivatives)


def run_cases(rank, world):
    torch.manual_seed(rank)
    return {case.__name__: case(rank, world) for case in CASES}


# --- What the tests compare it with.


@pytest.fixture(scope='module', params=[2, 4])
def processes(request, tmp_path_factory):
    """The results of each of 2 and of 4 processes."""
    return in_processes(run_cases, request.param, tmp_path_factory.mktemp('processes'))


def of(case, processes):
    return [result[case.__name__] for result in processes]


def same_state(states):
    """Whether all ranks hold the same bits."""
    return all(torch.equal(states[0][k], state[k]) for state in states for k in states[0])


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def pairwise(x):
    """Sum of the cosines of all pairs of images, and their number."""
    features = F.normalize(x.detach().double().flatten(1), dim=1)
    return (features @ features.T).sum() - len(x), len(x) * (len(x) - 1)


def weighted_similarity(batches):
    sums, numbers = zip(*(pairwise(x) for x in batches if len(x)))
    return sum(sums) / sum(numbers)


class Whole(UBN):
    """UBN of the whole batch whose similarity is that of the pairs inside each rank."""

    def __init__(self, sizes, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.sizes = sizes

    def forward(self, x):
        similarity = weighted_similarity(x.split(self.sizes))
        with mock.patch.object(TorchBackend, '_pairs') as pairs:
            pairs.return_value = torch.stack([torch.ones(()), similarity.float()])
            return super().forward(x)


@pytest.mark.parametrize('split', SPLITS)
def test_five_steps_equal_those_of_one_process(processes, split):
    sizes = SPLITS[split][len(processes)]
    ranks = [result[split] for result in of(steps, processes)]
    expected = five_steps(sizes, make=functools.partial(Whole, sizes, backend='torch'))
    assert expected['gates'] == [True, False, True, True, False]
    for rank in ranks:
        assert rank['gates'] == expected['gates']
    for key in ('y', 'dx'):
        for step in range(5):
            close(torch.cat([rank[key][step] for rank in ranks]), expected[key][step])
    close(ranks[0]['state'], expected['state'])
    assert same_state([rank['state'] for rank in ranks])


def literal(norm, batches):
    """The equations over all batches, in float64: outputs, gradients and buffers."""
    params = {key: p.detach().double().requires_grad_() for key, p in norm.named_parameters()}
    xs = [x.requires_grad_() for x, _ in batches]
    center = params.get('center_weight', torch.zeros(C)).view(-1, 1, 1)
    centred = [x + center * x.mean((2, 3), keepdim=True) for x in xs]
    values = torch.cat([x.transpose(0, 1).flatten(1) for x in centred if len(x)], dim=1)
    var, mean = torch.var_mean(values, dim=1, correction=0)
    rest = {key: value for key, value in params.items() if key != 'center_weight'}
    ys = [reference.normalize(x, mean, var, 1e-5, **rest) for x in centred if len(x)]
    sum((y * dy).sum() for y, (_, dy) in zip(ys, [b for b in batches if len(b[0])])).backward()
    result = dict(
        y=torch.cat([y.detach().flatten() for y in ys]),
        dx=torch.cat([x.grad.flatten() for x in xs if len(x)]),
        gradients={key: p.grad for key, p in params.items()},
    )
    momentum = 1.0 if norm.momentum is None else norm.momentum
    if norm.track_running_stats:
        gated = (norm.fct is not None and momentum != 1) or norm.momentum is None
        seen = [x[:, :, :: norm.fct_stride, :: norm.fct_stride] for x, _ in batches]
        tau = 1 - 0.1 * gated * (1 - weighted_similarity(seen))
        result['buffers'] = dict(
            running_mean=momentum * mean.detach(),
            running_var=1 - momentum + momentum * values.detach().var(1),
            num_batches_tracked=torch.tensor(1),
            running_similarity=torch.as_tensor(tau),
        )
    return result


@pytest.mark.parametrize('name', SETTINGS)
def test_images_of_different_sizes(processes, name):
    ranks = [result[name] for result in of(sizes, processes)]
    norm = shaken(UBN(C, **SETTINGS[name]))
    expected = literal(norm, layer_inputs(len(processes), torch.float64))
    for key in ('y', 'dx'):
        close(torch.cat([rank[key].flatten() for rank in ranks]).double(), expected[key])
    for key, gradient in expected['gradients'].items():
        for rank in ranks:
            close(rank['gradients'][key].double(), gradient)
    for key, buffer in expected.get('buffers', {}).items():
        close(ranks[0]['state'][key].double(), buffer.double())
    assert same_state([rank['state'] for rank in ranks])


def test_one_collective_each_way_and_none_in_evaluation(processes):
    for result in of(traffic, processes):
        expected = dict(all_gather=2 * C + 3), dict(all_gather=1), dict(all_reduce=2 * C)
        for counts in result['counts']:
            assert counts == (*expected, dict(all_reduce=1))
        assert result['gate'] is False  # in the second step
        assert not result['evaluation']


def test_recomputation_moves_nothing(processes):
    for plain, *checkpointed in of(recomputed, processes):
        assert plain[-2] == 6  # num_batches_tracked
        for result in checkpointed:
            assert all(torch.equal(a, b) for a, b in zip(plain, result))


def test_corners(processes):
    ranks = of(corners, processes)
    for result in ranks:
        for case in ('nothing', 'nan'):
            for key, value in result['start'].items():
                # The ranks without NaN have a similarity, which counts.
                if (case, key) != ('nan', 'running_similarity'):
                    assert torch.equal(result[case][key], value), (case, key)
        assert result['nan']['running_similarity'].isfinite()
        assert all(g is not None and not g.any() for g in result['gradients'])
        assert result['flat'] == (2, C, 0, 5)
    values = torch.arange(len(ranks), dtype=torch.float32)
    expected = (values - values.mean()) / (values.var(correction=0) + 1e-5).sqrt()
    expected = torch.sigmoid(expected * 0 + 1) * expected
    close(torch.stack([result['single'][0, 0, 0, 0] for result in ranks]), expected)
    close(ranks[0]['single state']['running_var'], 0.9 + 0.1 * values.var().expand(C))
    assert same_state([result['nan'] for result in ranks])


def test_groups(processes):
    ranks = of(groups, processes)
    for rank, result in enumerate(ranks):
        alone = UBN(C, fct_warmup=0)
        assert torch.equal(alone(result['alone']['x']), result['alone']['y'])
        assert same_state([result['alone']['state'], alone.state_dict()])
        first = rank // 2 * 2
        pair = [ranks[r]['pair'] for r in (first, first + 1)]
        close(
            pair[0]['state']['running_mean'],
            0.1 * torch.cat([p['x'] for p in pair]).mean((0, 2, 3)),
        )
        assert same_state([p['state'] for p in pair])


def test_under_ddp(processes):
    ranks = of(ddp, processes)
    expected = ddp(None, len(processes))
    for rank in ranks:
        close(rank['gradients'], expected['gradients'])
    assert same_state([rank['state'] for rank in ranks])


def test_compiled_with_a_process_without_images(processes):
    for eager, result in of(compiled, processes):
        assert all(torch.equal(a, b) for a, b in zip(eager, result))


def test_no_derivative_leaves_the_other_processes_out(processes):
    for told in of(derivatives, processes):
        assert len(told) == 5
        assert all('through statistics of several processes: use UBN' in line for line in told)


@pytest.mark.parametrize('name', SETTINGS)
def test_on_one_process_it_is_ubn(name):
    layers = [shaken(make(C, **SETTINGS[name])) for make in (SyncUBN, UBN)]
    x = torch.randn(4, C, 5, 5)
    assert torch.equal(*[layer(x) for layer in layers])
    assert same_state([layer.state_dict() for layer in layers])
    assert repr(layers[0]) == repr(layers[1]).replace('UBN', 'SyncUBN')


def test_refuses_what_ubn_refuses():
    with pytest.raises(TypeError, match="SyncUBN got an unknown key 'fctt', did you mean 'fct'"):
        SyncUBN(3, fctt=0.15)
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        SyncUBN(3)(torch.randn(1, 3, 1, 1))

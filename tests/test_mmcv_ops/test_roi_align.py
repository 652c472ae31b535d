"""RoIAlign against its definition, under autocast, torch.compile, ONNX and in two processes."""

import inspect
import sys

import formulas
import pytest
import torch
from mmcv.ops import RoIAlign, nms, roi_align
from stand_in import load_stand_in, users
from torch import distributed, multiprocessing, nn
from torch.autograd import gradcheck

# Inside; over the border; far outside; smaller than a pixel; turned round.
ROIS = [
    [0, 2.0, 3.0, 21.0, 15.5],
    [1, -6.0, -4.0, 9.0, 30.0],
    [1, 90.0, 90.0, 99.0, 99.0],
    [0, 7.2, 7.4, 7.6, 7.5],
    [1, 12.0, 12.0, 4.0, 3.0],
]
CASES = {  # bins, scale, samples, aligned
    'mmdet': ((7, 7), 0.5, 0, True),
    'two samples': ((2, 3), 0.25, 2, True),
    'legacy': ((3, 2), 0.5, 0, False),
}


@pytest.fixture
def every_roi():
    return torch.tensor(ROIS, dtype=torch.float64)


@pytest.fixture
def rois(every_roi):
    """Those that can be aligned."""
    return every_roi[:4]


@pytest.mark.parametrize('case', CASES)
def test_forward(case, every_roi, rois):
    bins, scale, samples, aligned = CASES[case]
    rois = rois if aligned else every_roi
    x = torch.randn(2, 2, 14, 12, dtype=torch.float64)
    expected = formulas.roi_align(x, rois, *CASES[case])
    assert expected.count_nonzero() > expected.numel() // 2
    layer = RoIAlign(bins, scale, samples, aligned=aligned)
    torch.testing.assert_close(layer(x, rois), expected)
    actual = layer(x.float(), rois.float())
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('case', CASES)
def test_gradient(case, every_roi, rois):
    x = torch.randn(2, 2, 9, 8, dtype=torch.float64, requires_grad=True)
    bins, scale, samples, aligned = CASES[case]
    rois = rois if aligned else every_roi
    assert gradcheck(lambda x: roi_align(x, rois, bins, scale, samples, 'avg', aligned), x)


@pytest.mark.parametrize('case', CASES)
def test_equals_the_compiled_one(compiled, ext, case, every_roi, rois, monkeypatch):
    bins, scale, samples, aligned = CASES[case]
    rois = (rois if aligned else every_roi).float()
    x = torch.randn(2, 3, 14, 12, requires_grad=True)
    upstream = torch.randn(len(rois), 3, *bins)
    results = []
    for module in (compiled, ext):
        monkeypatch.setattr(sys.modules['mmcv.ops.roi_align'], 'ext_module', module)
        y = roi_align(x, rois, bins, scale, samples, 'avg', aligned)
        results.append((y, *torch.autograd.grad(y, x, upstream)))
    for expected, actual in zip(*results):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize('box', [[0, 0, 0, float('nan'), 1], [0, 0, 0, 1, float('inf')]])
@pytest.mark.parametrize('aligned', [True, False])
def test_boxes_of_a_training_that_diverged(box, aligned):
    with pytest.raises(RuntimeError, match='RoIAlign: the boxes must be finite'):
        roi_align(torch.randn(1, 2, 8, 8), torch.tensor([box]), (3, 3), 1.0, 0, 'avg', aligned)


def test_a_box_turned_round_cannot_be_aligned(every_roi):
    x = torch.randn(2, 2, 8, 8)
    with pytest.raises(RuntimeError, match='x1 <= x2 and y1 <= y2'):
        roi_align(x, every_roi.float(), (3, 3), 0.5)


def test_without_rois():
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    y = roi_align(x, x.new_zeros(0, 5), (7, 7), 0.5)
    assert y.shape == (0, 3, 7, 7)
    y.sum().backward()
    assert not x.grad.any()


def test_channels_last(rois):
    """The values of the same tensor in the other format; mmcv's own CPU operator misreads it."""
    x = torch.randn(2, 3, 14, 12)
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = x.detach().contiguous(memory_format=memory_format).requires_grad_()
        y = roi_align(x, rois.float(), (3, 3), 0.5)
        (gradient,) = torch.autograd.grad(y, x, y.detach().cos().to(memory_format=memory_format))
        results.append((y, gradient))
    for expected, actual in zip(*results):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('autocast', [False, True])
def test_half_precision(dtype, autocast, rois):
    """The input's dtype comes out, computed in float32, whichever dtype the boxes have."""
    rois = rois.to(dtype)
    x = torch.randn(2, 3, 14, 12).to(dtype).requires_grad_()
    with torch.autocast('cpu', dtype=torch.bfloat16, enabled=autocast):
        y = roi_align(x, rois.float(), (3, 3), 0.5)
        upstream = torch.randn_like(y)
        (gradient,) = torch.autograd.grad(y, x, upstream)
    wide = x.detach().float().requires_grad_()
    expected = roi_align(wide, rois.float(), (3, 3), 0.5)
    (expected_gradient,) = torch.autograd.grad(expected, wide, upstream.float())
    assert y.dtype == gradient.dtype == dtype
    assert torch.equal(y, expected.to(dtype))
    assert torch.equal(gradient, expected_gradient.to(dtype))


def test_compiled_training_keeps_the_gradients(rois):
    """Without torch.compiler.disable they were 0, and nothing said so."""
    torch._dynamo.reset()
    conv, align = nn.Conv2d(3, 4, 3, padding=1), RoIAlign((3, 3), 0.5, 2)

    def step(x):
        return align(conv(x).relu(), rois.float()).sin()

    x = torch.randn(2, 3, 14, 12)
    upstream = torch.randn(len(rois), 4, 3, 3)
    results = []
    for function in (step, torch.compile(step, backend='aot_eager')):
        conv.zero_grad()
        y = function(x)
        y.backward(upstream)
        results.append([y.detach(), *(p.grad.clone() for p in conv.parameters())])
    for expected, actual in zip(*results):
        assert expected.any()
        torch.testing.assert_close(actual, expected)


class _Align(nn.Module):
    def forward(self, x, rois):
        return roi_align(x, rois, (3, 3), 0.5, 2, 'avg', True)


class _Suppress(nn.Module):
    def forward(self, boxes, scores):
        return nms(boxes, scores, 0.5)


def _boxes(n):
    boxes = 50 * torch.rand(n, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes, torch.rand(n)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('model', [_Align, _Suppress])
@pytest.mark.parametrize(
    ('dynamo', 'opset'),
    [
        pytest.param(
            *(True, 18),
            id='torch.export',
            marks=pytest.mark.newer_torch('torch.onnx.export has no dynamo='),
        ),
        pytest.param(*(False, 11), id='TorchScript'),
    ],
)
def test_onnx(model, dynamo, opset, tmp_path, rois):
    """The exported operator computes: it is fed other inputs than those it was traced with.

    TorchScript's exporter takes mmcv's own symbolic of RoIAlign, which is for opset 11 and 12.
    """
    pytest.importorskip('onnx')
    onnxruntime = pytest.importorskip('onnxruntime')
    if dynamo:
        pytest.importorskip('onnxscript')
    draw = {
        _Align: lambda: (torch.randn(2, 3, 14, 12), rois[torch.randint(2, (5,))]),
        _Suppress: lambda: _boxes(80),
    }[model]
    rois = rois[:2].float()  # opset 11 has no box of less than a pixel
    path = tmp_path / 'model.onnx'
    exporter = dict(dynamo=True) if dynamo else {}
    if not dynamo and 'dynamo' in inspect.signature(torch.onnx.export).parameters:
        exporter = dict(dynamo=False)  # no longer the default
    torch.onnx.export(
        model(), draw(), path, opset_version=opset, input_names=['a', 'b'], **exporter
    )
    inputs = draw()
    session = onnxruntime.InferenceSession(path)
    outputs = session.run(None, {'a': inputs[0].numpy(), 'b': inputs[1].numpy()})
    expected = model()(*inputs)
    for actual, wanted in zip(outputs, expected if model is _Suppress else [expected]):
        torch.testing.assert_close(torch.from_numpy(actual), wanted, rtol=1e-5, atol=1e-5)


def _gradient(images):
    """That of a convolution before RoIAlign, averaged over the images."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, padding=1)
    x, upstream = torch.randn(2, 3, 14, 12), torch.randn(2, 4, 3, 3)
    model = nn.parallel.DistributedDataParallel(conv) if distributed.is_initialized() else conv
    rois = torch.tensor([[i, 2.0, 3, 21, 15] for i in range(len(images))])
    y = roi_align(model(x[images]), rois, (3, 3), 0.5)
    (y * upstream[images]).sum().div(len(images)).backward()
    return conv.weight.grad


def _train(rank, folder):
    stand_in = load_stand_in()
    for module in users():
        module.ext_module = stand_in
    distributed.init_process_group('gloo', f'file://{folder}/store', rank=rank, world_size=2)
    torch.save(_gradient([rank]), f'{folder}/{rank}.pt')
    distributed.destroy_process_group()


def test_two_processes_average_the_gradients_of_one(tmp_path):
    multiprocessing.get_context('forkserver').set_forkserver_preload(['mmcv.ops'])
    multiprocessing.start_processes(_train, (tmp_path,), nprocs=2, start_method='forkserver')
    expected = _gradient([0, 1])
    assert expected.any()
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f'{rank}.pt'), expected)

"""Prepared networks in what serves them: torch.export, ONNX in both exporters, OpenVINO."""

from collections import Counter

import numpy as np
import pytest
import torch
from of_inference import KINDS
from torch import nn
from weights import difference, trained

import mmubn
from mmubn import prepare_for_inference

pytestmark = [
    pytest.mark.filterwarnings('ignore'),
    pytest.mark.newer_torch('its exporters know no dynamic sizes'),
]
ANY = getattr(getattr(torch.export, 'Dim', None), 'DYNAMIC', None)
DYNAMIC = {0: ANY, 2: ANY, 3: ANY}


def network(kind: str) -> nn.Module:
    """Folded layers, one that stands alone, strides, groups."""
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, groups=4), nn.BatchNorm2d(16), nn.ReLU(), nn.BatchNorm2d(16)),
        *(nn.Conv2d(16, 24, 1, bias=False), nn.BatchNorm2d(24), nn.AdaptiveAvgPool2d(1)),
        *(nn.Flatten(), nn.Linear(24, 5)),
    )
    return trained(mmubn.convert_norm(model, dict(type=kind)))


@pytest.fixture(params=KINDS)
def pair(request):
    """A network and itself prepared."""
    model = network(request.param)
    return model, prepare_for_inference(model)


def to_onnx(model, x, path, dynamo, dynamic=False, opset=None):
    options = {}
    if dynamic and dynamo:
        options['dynamic_shapes'] = (DYNAMIC,)
    elif dynamic:
        options.update(input_names=['x'], dynamic_axes={'x': list(DYNAMIC)})
    torch.onnx.export(model, (x,), path, dynamo=dynamo, opset_version=opset, **options)


def run_onnx(path, x):
    onnxruntime = pytest.importorskip('onnxruntime')
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    (output, *_) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(output)


def operators(path) -> Counter:
    onnx = pytest.importorskip('onnx')
    return Counter(node.op_type for node in onnx.load(path).graph.node)


# Of what can be in such a graph, what TensorRT's parser lists as supported: onnx-tensorrt,
# docs/operators.md, in the version for TensorRT 8.4. OpenVINO is run below.
SUPPORTED = {
    *('Add', 'BatchNormalization', 'Conv', 'Flatten', 'Gemm', 'GlobalAveragePool', 'MaxPool'),
    *('Mul', 'ReduceMean', 'Relu', 'Reshape', 'Sigmoid', 'Sub'),
}


@pytest.mark.parametrize(
    ('pair', 'dynamo', 'dynamic'),
    [
        *(('UBN', dynamo, dynamic) for dynamo in (True, False) for dynamic in (True, False)),
        *((kind, True, True) for kind in ('RBN', 'BNET', 'IEBN')),
        ('IEBN', False, False),
    ],
    indirect=['pair'],
)
def test_onnx(pair, dynamo, dynamic, tmp_path):
    model, prepared = pair
    path = tmp_path / 'net.onnx'
    x = torch.randn(2, 3, 24, 20)
    to_onnx(prepared, x, path, dynamo, dynamic)
    with torch.no_grad():
        assert difference(run_onnx(path, x), model(x)) < 1e-4
        if dynamic:
            other = torch.randn(3, 3, 17, 31)
            assert difference(run_onnx(path, other), model(other)) < 1e-4
    if not dynamic:  # no shape arithmetic
        assert set(operators(path)) <= SUPPORTED


@pytest.mark.parametrize(
    ('dynamo', 'opset'), [(True, 18), (True, 23), (False, 13), (False, 20)], ids=str
)
def test_onnx_opsets(dynamo, opset, tmp_path):
    onnx = pytest.importorskip('onnx')
    model = network('UBN')
    x = torch.randn(2, 3, 24, 20)
    path = tmp_path / 'net.onnx'
    to_onnx(prepare_for_inference(model), x, path, dynamo, opset=opset)
    versions = {entry.domain: entry.version for entry in onnx.load(path).opset_import}
    assert versions[''] == opset
    with torch.no_grad():
        assert difference(run_onnx(path, x), model(x)) < 1e-4


@pytest.mark.parametrize('dynamo', [True, False], ids=['dynamo', 'torchscript'])
def test_nodes_of_a_layer(dynamo, tmp_path):
    """Eight of a layer with all it can have, counting the convolution before it."""
    layer = nn.Sequential(nn.Conv2d(3, 8, 3), mmubn.UBN(8))
    path = tmp_path / 'net.onnx'
    x = torch.randn(1, 3, 8, 8)
    to_onnx(prepare_for_inference(trained(layer)), x, path, dynamo)
    expected = dict(Conv=4, GlobalAveragePool=1, Sigmoid=1, Sub=1, Mul=1)
    assert operators(path) == expected
    layer = nn.Sequential(nn.Conv2d(3, 8, 3), mmubn.BNET(8))
    to_onnx(prepare_for_inference(trained(layer)), x, path, dynamo)
    assert operators(path) == dict(Conv=2)


def test_torch_export(pair):
    model, prepared = pair
    x = torch.randn(2, 3, 24, 20)
    program = torch.export.export(prepared, (x,), dynamic_shapes=(DYNAMIC,))
    other = torch.randn(3, 3, 17, 31)
    with torch.no_grad():
        for images in (x, other):
            assert difference(program.module()(images), model(images)) < 1e-5
    # The convolutions keep their outputs: what is written in place is the model's own.
    kept = other.clone()
    program.module()(other)
    assert torch.equal(kept, other)


def test_openvino(pair, tmp_path):
    openvino = pytest.importorskip('openvino', reason='OpenVINO is not installed')
    model, prepared = pair
    x = torch.randn(2, 3, 24, 20)
    path = tmp_path / 'net.onnx'
    to_onnx(prepared, x, path, dynamo=False, dynamic=True)
    hint = {'INFERENCE_PRECISION_HINT': 'f32'}
    compiled = openvino.Core().compile_model(str(path), 'CPU', hint)
    with torch.no_grad():
        for images in (x, torch.randn(3, 3, 17, 31)):
            actual = torch.from_numpy(np.asarray(compiled(images.numpy())[0]))
            assert difference(actual, model(images)) < 1e-4


def test_torchscript(pair):
    model, prepared = pair
    x = torch.randn(2, 3, 24, 20)
    traced = torch.jit.freeze(torch.jit.trace(prepared, x))
    other = torch.randn(3, 3, 17, 31)
    with torch.no_grad():
        assert difference(traced(other), model(other)) < 1e-5

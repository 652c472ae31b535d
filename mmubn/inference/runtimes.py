"""One call for every runtime that serves a model: images in, output out.

What a runtime needs beside torch (onnx and onnxscript for the export, onnxruntime, openvino) is
imported when it is asked for.
"""

import importlib
from pathlib import Path
from typing import Callable, Dict

import torch
from torch import Tensor, nn

Run = Callable[[Tensor], Tensor]


def export_onnx(model: nn.Module, images: Tensor, path: Path) -> None:
    """Writes a model as ONNX, whose batch and image size may then be any.

    Args:
        model (nn.Module): In evaluation mode, with one input and one output tensor.
        images (Tensor): An input, (N, C, H, W).
        path (Path): Where to.
    """
    sizes = {axis: torch.export.Dim.DYNAMIC for axis in (0, 2, 3)}
    torch.onnx.export(
        model,
        (torch.cat([images, images]),),  # a batch of 1 would be taken for a constant
        path,
        input_names=['images'],
        dynamo=True,
        dynamic_shapes=(sizes,),
        external_data=False,
        verbose=False,
    )


def eager(model: nn.Module, images: Tensor, onnx_file: Path) -> Run:
    """Torch as it is."""
    return torch.inference_mode()(model)


def channels_last(model: nn.Module, images: Tensor, onnx_file: Path) -> Run:
    """Torch with weights and images in the memory format channels_last."""
    model = model.to(memory_format=torch.channels_last)
    return torch.inference_mode()(lambda x: model(x.to(memory_format=torch.channels_last)))


def compiled(model: nn.Module, images: Tensor, onnx_file: Path) -> Run:
    """torch.compile, for the shape of the images alone."""
    torch._dynamo.reset()
    run = torch.compile(model, dynamic=False)
    return torch.no_grad()(run)


def onnxruntime(model: nn.Module, images: Tensor, onnx_file: Path) -> Run:
    """ONNX Runtime on the CPU, with the threads that torch has."""
    runtime = importlib.import_module('onnxruntime')
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(onnx_file, options, providers=['CPUExecutionProvider'])
    (name,) = (entry.name for entry in session.get_inputs())
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def openvino(model: nn.Module, images: Tensor, onnx_file: Path) -> Run:
    """OpenVINO on the CPU in float32, for the shape of the images alone."""
    runtime = importlib.import_module('openvino')
    core = runtime.Core()
    network = core.read_model(onnx_file)
    network.reshape(list(images.shape))
    settings = {
        'INFERENCE_PRECISION_HINT': 'f32',
        'INFERENCE_NUM_THREADS': torch.get_num_threads(),
        'PERFORMANCE_HINT': 'LATENCY',
    }
    request = core.compile_model(network, 'CPU', settings).create_infer_request()
    return lambda x: torch.from_numpy(request.infer({0: x.numpy()})[0].copy())


# What each takes: the model, images of the shape to come, and the model's ONNX file.
RUNTIMES: Dict[str, Callable[[nn.Module, Tensor, Path], Run]] = {
    'torch': eager,
    'torch, channels_last': channels_last,
    'torch.compile': compiled,
    'onnxruntime': onnxruntime,
    'openvino': openvino,
}
NEEDS = {name: ('onnx', 'onnxscript', name) for name in ('onnxruntime', 'openvino')}

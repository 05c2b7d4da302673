"""Models as ONNX files, run by onnxruntime."""

import pytest
import torch


def in_onnxruntime(model, x, path):
    """(output on one input, the tensors that the file holds); skips where a package is missing."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    held = [torch.from_numpy(onnx.numpy_helper.to_array(each).copy()) for each in onnx.load(path).graph.initializer]
    return torch.from_numpy(out), held

"""Masked models go where models go: ONNX files hold their zeros, and onnxruntime computes the same."""

import pytest
import torch
from torch import nn

from sfpk_kernels import prune
from sfpk_kernels.baselines import magnitude
from sfpk_kernels.demo.task import build_model

from .onnx_files import in_onnxruntime
from .settings import population


def attention():
    return nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0).eval(), torch.randn(3, 5, 16)


def residual():
    torch.manual_seed(0)
    model = build_model()
    model(torch.randn(32, 1, 8, 8))  # batch norms with statistics of their own
    return model.eval(), torch.randn(4, 1, 8, 8)


def perceptron():
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)).eval(), torch.randn(6, 8)


@pytest.mark.parametrize("make", [residual, perceptron, pytest.param(attention, marks=pytest.mark.slow)])
@pytest.mark.parametrize("sparsity", [0.9])
def test_onnx_computes_the_same(make, sparsity, tmp_path):
    model, x = make()
    dense = model(x).detach()
    masks = magnitude(model, sparsity, allocation="uniform")
    masks.apply_(model)
    out, held = in_onnxruntime(model, x, tmp_path / "m.onnx")
    expected = model(x).detach()
    assert not torch.allclose(dense, expected, atol=1e-3)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    # Every removed weight is 0 in the file, too; batch norms that are folded into convolutions scale the kept ones.
    nonzero = sum(int(tensor.count_nonzero()) for tensor in held if tensor.dim() > 1)
    assert nonzero <= masks.kept


def test_onnx_of_a_searched_mask(tmp_path):
    torch.manual_seed(0)
    model, x = perceptron()
    data = [(torch.randn(16, 8), torch.randint(4, (16,))) for _ in range(3)]
    result = prune(model, data, config=population(0.8, n_particles=2, n_steps=4))
    result.apply_(model)
    out, held = in_onnxruntime(model, x, tmp_path / "m.onnx")
    torch.testing.assert_close(out, model(x).detach(), rtol=1e-4, atol=1e-6)
    kept = {tuple(shape): int(result.mask[name].sum()) for name, shape in result.mask.shapes.items()}
    found = {tuple(tensor.shape): int(tensor.count_nonzero()) for tensor in held if tensor.dim() == 2}
    turned = {shape[::-1]: count for shape, count in kept.items()}
    assert found in (kept, turned)

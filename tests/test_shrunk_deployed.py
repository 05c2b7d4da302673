"""Shrunk models go where models go: torch.export, torch.compile in one graph, ONNX in onnxruntime."""

import io

import pytest
import torch
from torch import nn

from sfpk_kernels import recalibrate_batchnorm
from sfpk_kernels.baselines import structured_magnitude

from .attention_nets import transformer, vit
from .onnx_files import in_onnxruntime
from .structured_nets import make
from .structured_runs import images, mlp

pytest.importorskip("torch_pruning")


class Logits(nn.Module):
    """A Hugging Face model as a function of token numbers alone."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids).logits


def shrunk(name):
    """(a model without half of its multiplications, in eval mode; an input)."""
    if name == "bert":
        dense, inputs, _, _ = transformer("bert")
        found = structured_magnitude(dense.eval(), 0.2, example_inputs=inputs, budget="params")
        return Logits(found.shrink(dense)).eval(), inputs["input_ids"]
    dense, x = {
        "residual": lambda: make("residual"),
        "squeeze-excite": lambda: make("squeeze-excite"),
        "vit": vit,
        "mlp": lambda: (mlp().eval(), torch.randn(5, 6)),
    }[name]()
    found = structured_magnitude(dense, 0.5, example_inputs=x, allocation="uniform")
    smaller = found.shrink(dense)
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in dense.parameters())
    if name == "residual":
        recalibrate_batchnorm(smaller, images())
    return smaller.eval(), x


NAMES = ("residual", "squeeze-excite", "vit", "mlp", "bert")


def slow_but(*quick):
    """All names, those outside of ``quick`` for the slow tests."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]


@pytest.fixture(autouse=True)
def _forgotten():
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("name", slow_but("residual", "vit", "mlp"))
def test_torch_export_and_its_file(name):
    model, x = shrunk(name)
    program = torch.export.export(model, (x,))
    held = io.BytesIO()
    torch.export.save(program, held)
    held.seek(0)
    again = torch.export.load(held).module()
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(program.module()(x), expected)
        assert torch.equal(again(x), expected)


@pytest.mark.parametrize("name", slow_but("residual", "vit"))
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_compiled_in_one_graph(name, backend):
    model, x = shrunk(name)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_compiled_model_learns():
    model, x = shrunk("residual")
    model.train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(x).square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["residual", "vit"])
def test_compiled_by_inductor(name):
    model, x = shrunk(name)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", slow_but("residual"))
def test_onnx_computes_the_same(name, tmp_path):
    model, x = shrunk(name)
    out, _ = in_onnxruntime(model, x, tmp_path / "m.onnx")
    expected = model(x).detach()
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))

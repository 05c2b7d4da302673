"""Conversion to torch's 2:4 format: what it refuses, and, its kernels stood in for, what it converts and compares."""

import copy

import pytest
import torch
from torch import nn
from torch.sparse import _semi_structured_conversions as conversions

from sfpk_kernels import MaskSet, SFPKConfig, baselines, prune, to_semi_structured
from sfpk_kernels.export import semi_structured

from .snapshot import Snapshot


class Net(nn.Module):
    """A convolution, attention, two Linear layers of which one is tied to a third, and a small head."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 64, 1)
        self.attention = nn.MultiheadAttention(64, 2, batch_first=True)
        self.a, self.b, self.c = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 128, bias=False)
        self.b.weight = self.a.weight
        self.head = nn.Linear(128, 12)

    def forward(self, x):
        x = self.conv(x).transpose(1, 2)
        x = x + self.attention(x, x, x)[0]
        return {"logits": self.head(self.c(self.b(self.a(x).relu()).relu())), "class": x.argmax(dim=-1)}


@pytest.fixture
def net():
    return Net().to(torch.bfloat16).eval()


@pytest.fixture
def example():
    return (torch.randn(3, 4, 5, dtype=torch.bfloat16),)


def masks_of(model):
    return baselines.magnitude(model, 0.5, pattern=(2, 4))


@pytest.fixture
def stood_in(monkeypatch):
    """Weights that were converted; the device and the kernels are stood in for."""
    seen = []

    def converted(weight):
        seen.append(weight)
        assert weight.is_contiguous()
        assert not weight.requires_grad
        return weight.clone()

    monkeypatch.setattr(semi_structured, "check_device", lambda device: None)
    monkeypatch.setattr(semi_structured, "converted", converted)
    return seen


def test_what_is_converted_and_what_stays_dense(net, example, stood_in):
    masks, before = masks_of(net), Snapshot(net)
    result = to_semi_structured(net, masks, example, keep_dense=["head.weight"], runs=2)
    before.check()
    assert result.layers == ("a.weight", "c.weight")
    assert set(result.dense) == {"conv.weight", "attention.in_proj_weight", "attention.out_proj.weight", "head.weight"}
    assert result.dense["conv.weight"] == "of conv (Conv1d), no plain Linear layer"
    assert "MultiheadAttention" in result.dense["attention.out_proj.weight"]
    assert result.dense["head.weight"] == "keep_dense"
    masked = masks.apply_(copy.deepcopy(net))
    for name in result.layers:
        assert torch.equal(stood_in[result.layers.index(name)], masked.get_parameter(name))
        assert torch.equal(result.model.get_parameter(name), masked.get_parameter(name))
        assert not result.model.get_parameter(name).requires_grad
    assert result.model.b.weight is result.model.a.weight is not net.a.weight
    masked.requires_grad_(False)
    assert torch.equal(result.model(*example)["logits"], masked(*example)["logits"])
    assert result.difference == 0
    assert result.scale == pytest.approx(float(masked(*example)["logits"].abs().max()))
    assert result.seconds_dense > 0
    assert result.seconds_sparse > 0
    assert result.speedup == result.seconds_dense / result.seconds_sparse
    assert "2 weights converted, 4 left dense" in str(result)
    assert f"({result.speedup:.2f} ×), medians of 2 (cpu)" in str(result)


@pytest.mark.parametrize(("factor", "share"), [(1.01, 0.01), (1.5, None), (float("nan"), None)])
def test_outputs_are_compared(monkeypatch, stood_in, factor, share):
    """One layer without a bias: its outputs are as wrong as its weights."""
    model = nn.Sequential(nn.Linear(64, 32, bias=False)).to(torch.float16)
    x = torch.randn(8, 64, dtype=torch.float16)
    monkeypatch.setattr(semi_structured, "converted", lambda weight: weight * factor)
    if share is None:
        with pytest.raises(RuntimeError, match="^to_semi_structured: wanted outputs that differ by at most 0.05"):
            to_semi_structured(model, masks_of(model), x, runs=1)
    else:
        result = to_semi_structured(model, masks_of(model), x, runs=1)
        assert result.difference == pytest.approx(share * result.scale, rel=0.2)


def test_refusals_name_the_layer(net, example, stood_in, monkeypatch):
    masks = masks_of(net)
    for kind, words in [("cutlass", r"\(32, 64\) for cutlass"), ("cusparselt", r"\(16, 16\) for cusparselt")]:
        monkeypatch.setattr(semi_structured, "format_in_use", lambda kind=kind: kind)
        with pytest.raises(ValueError, match=rf"^head.weight: wanted a shape of multiples of {words}, got \(12, 128\)"):
            to_semi_structured(net, masks, example)
    with pytest.raises(TypeError, match="^a.weight: wanted float16 or bfloat16, got float32: model.to"):
        to_semi_structured(net.float(), masks, example)
    net.to(torch.bfloat16)
    others = {name: masks[name] for name in masks if name not in ("head.weight", "c.weight")}
    whole = MaskSet({**others, "c.weight": torch.ones(128, 64, dtype=torch.bool)})
    with pytest.raises(ValueError, match="^c.weight: wanted a mask that keeps at most 2 of every 4 inputs, got 4 in"):
        to_semi_structured(net, whole, example)
    with pytest.raises(ValueError, match="^mask: wanted a weight of a Linear layer to convert, got none"):
        to_semi_structured(net, MaskSet({"conv.weight": masks["conv.weight"]}), example)
    with pytest.raises(ValueError, match="^keep_dense: wanted names of the mask, .* got 'head'"):
        to_semi_structured(net, masks, example, keep_dense=["head"])
    with pytest.raises(TypeError, match="^keep_dense: wanted a list of names, got 'head.weight'"):
        to_semi_structured(net, masks, example, keep_dense="head.weight")
    with pytest.raises(TypeError, match="^mask: wanted a MaskSet, got dict"):
        to_semi_structured(net, {}, example)
    with pytest.raises(ValueError, match="^runs: wanted an integer ≥ 1, got 0"):
        to_semi_structured(net, masks, example, runs=0)
    with pytest.raises(ValueError, match="^tolerance: wanted a number ≥ 0, got nan"):
        to_semi_structured(net, masks, example, tolerance=float("nan"))
    with pytest.raises(ValueError, match="^model: wanted the model these masks were made for"):
        to_semi_structured(nn.Linear(4, 4), masks, example)
    assert stood_in == []


def test_the_cpu_is_refused(net, example):
    before = Snapshot(net)
    with pytest.raises(ValueError, match="^model: wanted it on a CUDA device of compute capability 8.0 .* on cpu"):
        to_semi_structured(net, masks_of(net), example)
    before.check()


def test_an_older_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(ValueError, match=r"compute capability 8.0 or later, .* got Tesla T4, 7.5"):
        semi_structured.check_device(torch.device("cuda:0"))


def test_torch_finds_all_that_a_searched_mask_keeps():
    """Its own packing, in plain torch, loses what it takes for removed: groups along another dimension would show."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32))
    batches = [(torch.randn(16, 64), torch.randint(32, (16,))) for _ in range(4)]
    masks = prune(model, batches, config=SFPKConfig(0.5, pattern=(2, 4), n_steps=4)).mask
    for name in masks:
        weight = (model.get_parameter(name) * masks[name]).detach().half()
        again = conversions.sparse_semi_structured_to_dense_cutlass(
            *conversions.sparse_semi_structured_from_dense_cutlass(weight)
        )
        assert torch.equal(again, weight)
        assert int(again.count_nonzero()) == weight.numel() // 2


def test_shapes_are_those_of_torch():
    kinds = {
        "cutlass": torch.sparse.SparseSemiStructuredTensorCUTLASS,
        "cusparselt": torch.sparse.SparseSemiStructuredTensorCUSPARSELT,
    }
    for kind, multiples in semi_structured.MULTIPLES.items():
        for dtype in semi_structured.DTYPES:
            limits = kinds[kind]._DTYPE_SHAPE_CONSTRAINTS[dtype]
            assert (limits.sparse_min_rows, limits.sparse_min_cols) == multiples


def test_the_format_is_the_one_torch_was_built_with(monkeypatch):
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    assert semi_structured.format_in_use() == "cusparselt"
    monkeypatch.setattr(torch.sparse.SparseSemiStructuredTensor, "_FORCE_CUTLASS", True)
    assert semi_structured.format_in_use() == "cutlass"
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    monkeypatch.setattr(torch.sparse.SparseSemiStructuredTensor, "_FORCE_CUTLASS", False)
    assert semi_structured.format_in_use() == "cutlass"
    # Torch's own conversion is what is called: it refuses tensors on the CPU.
    with pytest.raises(RuntimeError, match="Only CUDA tensors are currently supported"):
        semi_structured.converted(torch.zeros(64, 64, dtype=torch.float16))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", semi_structured.DTYPES)
def test_on_a_gpu(dtype):
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256), nn.GELU(), nn.Linear(256, 12))
    model = model.to("cuda", dtype)
    masks = masks_of(model)
    x = torch.randn(64, 256, device="cuda", dtype=dtype)
    result = to_semi_structured(model, masks, x, keep_dense=["4.weight"], runs=3)
    assert result.layers == ("0.weight", "2.weight")
    assert isinstance(result.model[0].weight, torch.sparse.SparseSemiStructuredTensor)
    dense = masks.apply_(copy.deepcopy(model)).double()
    with torch.no_grad():
        torch.testing.assert_close(result.model(x).double(), dense(x.double()), atol=0.02 * result.scale, rtol=0)
    assert result.seconds_dense > 0
    assert result.seconds_sparse > 0

"""MaskSet: counts, application, files, fingerprint."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sfpk_kernels import MaskSet


@pytest.fixture
def masks(mlp):
    return MaskSet({"0.weight": torch.rand(12, 8) > 0.6, "2.weight": torch.rand(4, 12) > 0.3})


def test_counts_and_access(masks):
    dense = {name: masks[name] for name in masks}
    kept = sum(int(mask.sum()) for mask in dense.values())
    assert masks.kept == kept
    assert masks.prunable == 144
    assert masks.sparsity == 1 - kept / 144
    assert masks.layer_densities() == {name: float(m.double().mean()) for name, m in dense.items()}
    assert torch.equal(masks.flat(), torch.cat([m.flatten() for m in dense.values()]))
    assert MaskSet(dense) == masks
    assert hash(MaskSet(dense)) == hash(masks)
    assert len(masks) == 2
    assert "0.weight" in masks
    assert "1.weight" not in masks
    assert {name: mask.shape for name, mask in masks.items()} == masks.shapes
    assert MaskSet(masks) == masks
    assert "144 weights" in repr(masks)
    assert masks != 3


@pytest.mark.parametrize("shape", [(), (1,), (7,), (8,), (3, 3, 3), (257,)])
def test_any_shape_survives_packing(shape, tmp_path):
    mask = torch.rand(shape) > 0.5
    masks = MaskSet({"w": mask, "other": torch.ones(3, dtype=torch.bool)})
    assert torch.equal(masks["w"], mask)
    masks.save(tmp_path / "m.safetensors")
    assert torch.equal(MaskSet.load(tmp_path / "m.safetensors")["w"], mask)


def test_any_difference_changes_the_fingerprint(masks):
    dense = {name: masks[name] for name in masks}
    flipped = dense["2.weight"].clone()
    flipped[3, 11] ^= True
    others = [
        MaskSet({**dense, "2.weight": flipped}),
        MaskSet({"0.weight": dense["0.weight"]}),
        MaskSet({"0.weight": dense["0.weight"], "3.weight": dense["2.weight"]}),
        MaskSet({"0.weight": dense["0.weight"], "2.weight": dense["2.weight"].view(12, 4)}),
    ]
    assert len({masks.fingerprint(), *(other.fingerprint() for other in others)}) == 5


def test_the_order_of_the_masks_does_not_matter(masks, tmp_path):
    turned = MaskSet({name: masks[name] for name in reversed(list(masks))})
    assert turned == masks
    assert hash(turned) == hash(masks)
    turned.save(tmp_path / "m")
    assert MaskSet.load(tmp_path / "m") == masks
    assert list(MaskSet.load(tmp_path / "m")) == list(turned)


def test_apply(masks, mlp):
    mlp[0].weight.data[0, 0] = float("nan")
    masks = MaskSet({"0.weight": masks["0.weight"].index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(False)),
                     "2.weight": masks["2.weight"]})  # fmt: skip
    weight, bias = mlp[0].weight, mlp[0].bias.clone()
    expected = torch.where(masks["0.weight"], weight.detach(), 0.0)
    assert masks.apply_(mlp) is mlp
    assert mlp[0].weight is weight
    assert weight.is_leaf
    assert weight.requires_grad
    assert torch.equal(weight.detach(), expected)
    assert torch.equal(mlp[0].bias, bias)
    assert sum(int((p == 0).sum()) for p in (mlp[0].weight, mlp[2].weight)) == 144 - masks.kept


def test_save_and_load(masks, tmp_path):
    path = tmp_path / "masks.safetensors"
    masks.save(path)
    masks.save(path)  # replaces
    loaded = MaskSet.load(path)
    assert loaded == masks
    assert list(loaded) == list(masks)
    assert loaded.kept == masks.kept
    assert path.stat().st_size < 144 / 8 + 600, "one bit per weight"
    assert [p.name for p in tmp_path.iterdir()] == ["masks.safetensors"]


def test_masks_of_another_model_are_refused(masks, mlp, tmp_path):
    before = mlp[0].weight.clone()
    wider = nn.Sequential(mlp[0], nn.Tanh(), nn.Linear(12, 5))
    with pytest.raises(ValueError, match=r"2.weight is \(5, 12\) in the model, \(4, 12\) in the masks"):
        masks.apply_(wider)
    with pytest.raises(ValueError, match="2.weight is not in the model"):
        masks.apply_(nn.Sequential(mlp[0]))
    masks.save(tmp_path / "masks.safetensors")
    with pytest.raises(ValueError, match="wanted the model these masks were made for, got another: 2.weight"):
        MaskSet.load(tmp_path / "masks.safetensors").apply_(wider)
    assert torch.equal(mlp[0].weight, before)


def test_broken_files_are_refused(masks, tmp_path):
    path = tmp_path / "masks.safetensors"
    masks.save(path)
    good = path.read_bytes()
    with pytest.raises(FileNotFoundError, match="wanted a mask file"):
        MaskSet.load(tmp_path / "none")
    for broken in (b"", good[: len(good) - 1], good[:20], b"hello world"):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="no readable safetensors file"):
            MaskSet.load(path)
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(ValueError, match="was altered"):
        MaskSet.load(path)
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="wanted a file of format"):
        MaskSet.load(path)


def test_bad_masks():
    with pytest.raises(ValueError, match="at least one mask"):
        MaskSet({})
    with pytest.raises(ValueError, match="w: wanted at least one weight"):
        MaskSet({"w": torch.ones(0, 3, dtype=torch.bool)})
    with pytest.raises(TypeError, match=r"w: wanted a bool tensor, got torch.float32"):
        MaskSet({"w": torch.ones(3)})
    with pytest.raises(TypeError, match="w: wanted a bool tensor, got list"):
        MaskSet({"w": [True]})

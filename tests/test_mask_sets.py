"""MaskSet: set operations, metadata, refusals, masks of a pruned model, torch.nn.utils.prune."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import nn
from torch.nn.utils import prune as torch_prune

from sfpk_kernels import MaskSet
from sfpk_kernels.baselines import magnitude

from .wrappers import WRAPPERS


@pytest.fixture
def masks():
    return MaskSet({"0.weight": torch.rand(12, 8) > 0.6, "2.weight": torch.rand(4, 12) > 0.3})


@pytest.fixture
def others():
    return MaskSet({"2.weight": torch.rand(4, 12) > 0.5, "0.weight": torch.rand(12, 8) > 0.5})


@pytest.mark.parametrize("shape", [(), (1,), (7,), (8,), (3, 3), (257,)])
def test_set_operations(shape):
    a, b = torch.rand(shape) > 0.4, torch.rand(shape) > 0.4
    one, other = MaskSet({"w": a}), MaskSet({"w": b})
    for combined, expected in [
        (one & other, a & b), (one | other, a | b), (one ^ other, a ^ b), (~one, ~a), (~~one, a),
    ]:  # fmt: skip
        assert torch.equal(combined["w"], expected)
        assert combined == MaskSet({"w": expected}), "the bits behind the last weight are 0"
        assert combined.kept == int(expected.sum())
    union = int((a | b).sum())
    assert one.iou(other) == (int((a & b).sum()) / union if union else 1.0)
    assert one.hamming(other) == int((a ^ b).sum())
    assert (~one & one).iou(~one & one) == 1.0


def test_set_operations_go_by_name(masks, others):
    both = masks & others
    assert list(both) == list(masks)
    assert torch.equal(both["2.weight"], masks["2.weight"] & others["2.weight"])
    assert masks.hamming(others) == others.hamming(masks)


def test_set_operations_want_the_same_tensors(masks):
    other = MaskSet({"0.weight": masks["0.weight"].T, "3.weight": masks["2.weight"]})
    for operation in (masks.__and__, masks.__or__, masks.__xor__, masks.iou, masks.hamming):
        with pytest.raises(ValueError, match=r"0.weight: \(12, 8\) and \(8, 12\), 2.weight: \(4, 12\) and none"):
            operation(other)
    with pytest.raises(TypeError, match="unsupported operand"):
        masks & 3


def test_metadata(masks, tmp_path):
    given = {"run": "a", "scores": [1, 2.5, None], "nested": {"ok": True}}
    kept = masks.with_metadata(given)
    given["scores"].append(3)
    assert kept == masks
    assert masks.metadata == {}
    assert kept.metadata["scores"] == [1, 2.5, None]
    kept.metadata["run"] = "changed"
    assert kept.metadata["run"] == "a"
    kept.save(tmp_path / "m")
    assert MaskSet.load(tmp_path / "m").metadata == {"run": "a", "scores": [1, 2.5, None], "nested": {"ok": True}}
    kept.save(tmp_path / "m", metadata={"run": "b"})
    assert MaskSet.load(tmp_path / "m").metadata == {"run": "b"}
    with safe_open(tmp_path / "m", framework="numpy") as file:
        facts = json.loads(file.metadata()["facts"])
    assert facts["kept"] == masks.kept
    assert facts["sparsity"] == masks.sparsity
    for bad in ([1], {1: 2}, {"a": torch.ones(1)}, {"a": float("nan")}):
        with pytest.raises(TypeError, match="metadata: wanted"):
            masks.with_metadata(bad)


def test_altered_metadata_are_refused(masks, tmp_path):
    path = tmp_path / "m"
    masks.save(path, metadata={"run": "abc"})
    path.write_bytes(path.read_bytes().replace(b"abc", b"abd"))
    with pytest.raises(ValueError, match="was altered: its metadata is broken"):
        MaskSet.load(path)


def test_files_of_the_format_before_are_refused(masks, tmp_path):
    """Their fingerprints depended on the order of the masks."""
    header = {
        "format": "sfpk-masks-1",
        "shapes": json.dumps({name: list(shape) for name, shape in masks.shapes.items()}),
        "fingerprint": masks.fingerprint(),
    }
    save_file(masks._bits, tmp_path / "m", metadata=header)
    with pytest.raises(ValueError, match="wanted a file of format sfpk-masks-2, got 'sfpk-masks-1'"):
        MaskSet.load(tmp_path / "m")


def test_bytes_round_trip(masks):
    again = MaskSet.from_bytes(masks.with_metadata({"a": 1}).to_bytes())
    assert again == masks
    assert again.metadata == {"a": 1}
    assert (again & masks) == masks, "loaded masks take part in set operations"
    with pytest.raises(ValueError, match="no readable safetensors file"):
        MaskSet.from_bytes(masks.to_bytes()[:-1])


def test_another_model_is_told_what_differs(masks, mlp):
    other = nn.Sequential(mlp[0], nn.Tanh(), nn.Linear(12, 5), nn.Linear(5, 2))
    with pytest.raises(ValueError, match=r"2.weight is \(5, 12\) in .*; prunable but without a mask: 3.weight"):
        masks.check(other)
    MaskSet({"0.weight": masks["0.weight"]}).check(mlp)  # an ignored layer is no error
    with pytest.raises(TypeError, match="model: wanted an nn.Module, got dict"):
        masks.apply_({})


def test_masks_of_a_pruned_model(masks, mlp):
    masks.apply_(mlp)
    assert MaskSet.from_model(mlp) == masks
    assert list(MaskSet.from_model(mlp, ignored_layers=["0"])) == ["2.weight"]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_wrapped_models_have_the_names_of_the_model_inside(masks, mlp, wrap):
    wrapped = wrap(mlp)
    assert masks.apply_(wrapped) is wrapped
    assert MaskSet.from_model(wrapped) == MaskSet.from_model(mlp) == masks
    with masks.enforce(torch.optim.SGD(wrapped.parameters(), 0.1), wrapped) as handle:
        assert len(handle) == 2
    expected = mlp(torch.ones(2, 8))
    assert masks.to_torch_prune(wrapped) is wrapped
    assert hasattr(mlp[0], "weight_mask")
    assert torch.equal(wrapped(torch.ones(2, 8)), expected)


def test_weights_that_are_elsewhere_are_refused(masks, mlp):
    model = copy.deepcopy(mlp)
    model[2].to("meta")  # as offloading leaves it
    optimizer = torch.optim.SGD(model.named_parameters(), 0.1)
    before = model[0].weight.detach().clone()
    for act in (
        masks.check, masks.apply_, masks.to_torch_prune, lambda m: masks.enforce(optimizer, m),
        lambda m: masks.enforce(optimizer),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"2.weight.*meta device"):
            act(model)
    assert torch.equal(model[0].weight, before)
    assert not optimizer._optimizer_step_post_hooks


def test_apply_state_dict_load(convnet, images):
    mask = magnitude(convnet, 0.7)
    fresh = copy.deepcopy(convnet)
    mask.apply_(convnet)
    fresh.load_state_dict(convnet.state_dict())
    assert torch.equal(fresh(images[0][0]), convnet(images[0][0]))
    assert MaskSet.from_model(fresh) == mask


def test_torch_prune_round_trip(convnet, images):
    x = images[0][0]
    mask = magnitude(convnet, 0.7)
    expected = mask.apply_(copy.deepcopy(convnet))(x)
    before = dict(convnet.named_parameters())
    values = {name: parameter.detach().clone() for name, parameter in before.items()}
    assert mask.to_torch_prune(convnet) is convnet
    parameters, buffers = dict(convnet.named_parameters()), dict(convnet.named_buffers())
    for name in mask:
        assert parameters[f"{name}_orig"] is before[name]
        assert torch.equal(parameters[f"{name}_orig"], values[name])
        assert torch.equal(buffers[f"{name}_mask"].bool(), mask[name])
    assert torch.equal(convnet(x), expected)
    with pytest.raises(ValueError, match=r"0.weight is under torch.nn.utils.prune: call prune.remove first"):
        mask.to_torch_prune(convnet)
    nn.functional.cross_entropy(convnet(x), images[0][1]).backward()
    assert parameters["0.weight_orig"].grad is not None
    for name in mask:
        torch_prune.remove(convnet.get_submodule(name.rpartition(".")[0]), "weight")
    after = dict(convnet.named_parameters())
    assert {name: id(p) for name, p in after.items()} == {name: id(p) for name, p in before.items()}
    assert MaskSet.from_model(convnet) == mask
    assert torch.equal(convnet(x), expected)


def test_torch_prune_of_tied_weights(mlp):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
            self.b.weight = self.a.weight
            self.again = self.a

        def forward(self, x):
            return self.again(self.b(self.a(x)))

    model, x = Tied(), torch.randn(3, 6)
    mask = magnitude(model, 0.5)
    assert list(mask) == ["a.weight"]
    expected = mask.apply_(copy.deepcopy(model))(x)
    weight = model.a.weight
    mask.to_torch_prune(model)
    assert torch.equal(model(x), expected)
    for module in (model.a, model.b):
        torch_prune.remove(module, "weight")
    assert model.a.weight is weight
    assert model.b.weight is weight
    assert MaskSet.from_model(model) == mask


def test_torch_prune_on_one_of_two_tied_weights_is_seen(mlp):
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    mask = magnitude(model, 0.5)
    torch_prune.identity(model[1], "weight")
    names = list(model.state_dict())
    for act in (mask.apply_, mask.to_torch_prune):
        with pytest.raises(ValueError, match=r"1.weight, tied to 0.weight, is under torch.nn.utils.prune"):
            act(model)
    assert list(model.state_dict()) == names


def test_copies_after_the_hand_over(masks, mlp):
    """After a pass under no_grad, as torch's pruning has it."""
    x = torch.ones(2, 8)
    expected = masks.apply_(copy.deepcopy(mlp))(x)
    masks.to_torch_prune(mlp)
    with torch.no_grad():
        mlp(x)
    again = copy.deepcopy(mlp)
    assert torch.equal(again(x), expected)
    again(x).sum().backward()
    assert again[0].weight_orig.grad is not None


def test_a_weight_read_without_its_module_is_no_silent_freeze(masks, mlp):
    """Torch refuses to train it under its pruning, rather than leave it as it is."""
    masks.to_torch_prune(mlp)

    def loss():
        return nn.functional.linear(torch.ones(2, 8), mlp[0].weight).sum()

    loss().backward()
    assert mlp[0].weight_orig.grad is not None
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss().backward()


def test_torch_prune_of_attention_is_no_silent_freeze():
    """out_proj is read without being called."""
    model = nn.MultiheadAttention(8, 2)
    magnitude(model, 0.5).to_torch_prune(model)
    x = torch.ones(3, 8)
    model(x, x, x)[0].sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        model(x, x, x)[0].sum().backward()


def test_torch_prune_refuses_another_model_unchanged(masks, mlp):
    names = [name for name, _ in mlp.named_parameters()]
    with pytest.raises(ValueError, match="2.weight is not in the model"):
        masks.to_torch_prune(nn.Sequential(mlp[0]))
    assert [name for name, _ in mlp.named_parameters()] == names

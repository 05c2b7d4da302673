"""Coupled channels are one coordinate, and a model shrunk by them computes what the masked one does."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sfpk_kernels.structure import (
    CoordinateGroup,
    Entry,
    ShrinkRecipe,
    Structure,
    find_structure,
    gated_call,
    shrink,
    verify,
)
from sfpk_kernels.structure.verify import proven

from .snapshot import Snapshot
from .structured_nets import NETS, Residual, make, mlp, plain

pytest.importorskip("torch_pruning")

# By hand: what moves together, and how many of it.
GROUPS = {
    "plain": {"0.0": 8, "1.0": 6, "3.0": 7},
    "residual": {"stem": 8, "a": 6},
    "mobilenet": {"0.0": 8, "2.0": 12, "4.0": 10},
    "squeeze-excite": {"stem.0": 8, "expand.0": 16, "down": 4},
    "concat": {"a.0": 5, "b.0": 4, "c.0": 6},
    "unet": {"down.0": 6, "bottom.0": 8, "up": 6, "join.0": 6},
    "flatten": {"0.0": 6, "3": 10},
    "many groups": {"0.0": 8, "2.0": 8},
    "two groups": {"0.0": 8, "1.0": 12, "2.0": 8},
    "chunk": {"a.0": 4, "b.0": 4},
    "chunk added": {"a.0": 4},
    "shared": {"a": 6, "c": 8},
    "convnext": {"stem": 8, "up": 16},
    "mlp": {"0": 16, "3": 12, "6": 10},
    "signal": {"0": 3, "3": 4, "4": 5},
}


def random_keep(structure, share, generator):
    """Bernoulli, one of every layer at least."""
    keep = torch.rand(structure.size, generator=generator) >= share
    for layer in structure.layers:
        if not keep[layer].any():
            keep[layer[0]] = True
    return keep


def close(a, b, scale):
    return bool((a - b).abs().max() <= 1e-5 * scale.abs().max())


@pytest.mark.parametrize("name", NETS)
def test_groups(name):
    model, x = make(name)
    snapshot = Snapshot(model)
    structure = find_structure(model, x)
    snapshot.check()
    assert {group.name: group.size for group in structure.groups} == GROUPS[name]
    linear = {n for n, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert all((group.kind == "neuron") == (group.name in linear) for group in structure.groups)
    assert structure.protected  # classifiers and whatever else leaves the model


@pytest.mark.parametrize("name", NETS)
def test_shrunk_equals_masked(name):
    model, x = make(name)
    structure = find_structure(model, x, check=False)
    snapshot = Snapshot(model)
    generator = torch.Generator().manual_seed(1)
    dense = model(x)
    keeps = [random_keep(structure, share, generator) for share in (0.2, 0.5, 0.8)]
    assert not keeps[-1].all()
    for group in structure.groups if structure.size < 40 else ():
        keeps += [torch.arange(structure.size) != group.first + i for i in range(min(group.size, 4))]
    for keep in keeps:
        smaller = shrink(model, structure, keep)
        assert close(gated_call(model, structure, keep, (x,)), smaller(x), dense)
        lost = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in smaller.parameters())
        assert (lost == 0) == bool(keep.all())
        for module in smaller.modules():  # what modules say of themselves is true
            if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
                twin = type(module)(**_arguments(module))
                assert {k: v.shape for k, v in twin.state_dict().items()} == {
                    k: v.shape for k, v in module.state_dict().items()
                }
    snapshot.check()
    assert torch.equal(model(x), dense)


def _arguments(module):
    if isinstance(module, nn.Linear):
        return {"in_features": module.in_features, "out_features": module.out_features, "bias": module.bias is not None}
    names = ("in_channels", "out_channels", "kernel_size", "groups")
    return {**{name: getattr(module, name) for name in names}, "bias": module.bias is not None}


def test_shrunk_equals_masked_with_batch_statistics():
    model, x = make("residual")
    structure = find_structure(model, x)
    keep = torch.arange(structure.size) % 3 > 0
    smaller = shrink(model, structure, keep).train()
    model.train()
    assert close(gated_call(copy.deepcopy(model), structure, keep, (x,)), smaller(x), model(x))


def test_masking_by_hand():
    """A residual net written out: removed channels of the sum and of the branch are read by nobody."""
    model, x = make("residual")
    structure = find_structure(model, x)
    keep = torch.rand(structure.size) > 0.4
    stem, branch = keep[:8].float().view(1, 8, 1, 1), keep[8:].float().view(1, 6, 1, 1)
    y = F.relu(model.norm(model.stem(x)))
    y = y + model.b(F.relu(model.a(y * stem)) * branch)
    expected = model.head(y * stem)
    assert close(gated_call(model, structure, keep, (x,)), expected, expected)
    assert close(shrink(model, structure, keep)(x), expected, expected)


def test_a_recipe_shrinks_a_fresh_model():
    model, x = make("squeeze-excite")
    structure = find_structure(model, x)
    keep = random_keep(structure, 0.5, torch.Generator().manual_seed(2))
    smaller = shrink(model, structure, keep)
    recipe = ShrinkRecipe.from_dict(json.loads(json.dumps(ShrinkRecipe.of(structure, keep).to_dict())))
    assert recipe == ShrinkRecipe.of(structure, keep)
    fresh = recipe.shrink(make("squeeze-excite")[0])
    fresh.load_state_dict(smaller.state_dict())
    assert torch.equal(fresh.eval()(x), smaller(x))
    assert recipe.groups["stem.0"] == keep[:8].nonzero().flatten().tolist()
    with pytest.raises(ValueError, match="model: wanted stem.0.weight with 8 positions along dim 0, got shape none"):
        recipe.shrink(plain())
    with pytest.raises(ValueError, match="values: wanted what to_dict"):
        ShrinkRecipe.from_dict({"groups": {}})


def test_shrunk_models_train_and_stay_frozen_where_they_were():
    model, x = make("plain")
    model[0][0].weight.requires_grad_(False)
    structure = find_structure(model, x)
    assert structure.groups[0].name == "0.0"  # a frozen layer is seen
    smaller = shrink(model, structure, torch.arange(structure.size) % 2 == 0)
    assert not smaller[0][0].weight.requires_grad
    assert smaller[0][0].weight.shape == (4, 3, 3, 3)
    smaller(x).sum().backward()
    assert all(p.grad is not None for p in smaller.parameters() if p.requires_grad)
    assert all(p.grad is None for p in model.parameters())


def test_ignored_layers_keep_their_outputs():
    model, x = make("plain")
    by_name = find_structure(model, x, ignored_layers=["1.0"])
    assert [group.name for group in by_name.groups] == ["0.0", "3.0"]
    assert by_name.protected["1.0"] == "ignored_layers"
    by_module = find_structure(model, x, ignored_layers=[model[1][1]])  # its batch-norm has the same channels
    assert by_module.groups == by_name.groups
    with pytest.raises(ValueError, match="ignored_layers: 'fc' matches no parameter"):
        find_structure(model, x, ignored_layers=["fc"])
    with pytest.raises(
        ValueError, match="wanted channels, heads or neurons that can be removed, found none; .*4.fc: leaves"
    ):
        find_structure(model, x, ignored_layers=[nn.Conv2d])


def test_inputs_of_several_kinds():
    model, x = make("plain")
    expected = find_structure(model, x).groups

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, image, scale, *, as_dict=False):
            y = self.net(image) * scale
            return {"y": y, "nothing": None} if as_dict else (y, [y])

    for inputs in ((x, 2.0), {"image": x, "scale": 2.0, "as_dict": True}):
        groups = find_structure(Named(), inputs).groups
        assert [(f"net.{g.name}", g.size) for g in expected] == [(g.name, g.size) for g in groups]
    with pytest.raises(TypeError, match="example_inputs: wanted a tensor, a tuple of arguments or a dict"):
        find_structure(model, 3)


def test_what_is_kept_is_checked():
    model, x = make("plain")
    structure = find_structure(model, x)
    with pytest.raises(TypeError, match=r"keep: wanted a bool tensor \(21,\), got torch.float32"):
        shrink(model, structure, torch.ones(21))
    with pytest.raises(ValueError, match=r"keep: wanted shape \(21,\), got \(20,\)"):
        shrink(model, structure, torch.ones(20, dtype=torch.bool))
    keep = torch.ones(21, dtype=torch.bool)
    keep[8:14] = False
    with pytest.raises(ValueError, match="keep: wanted at least one channel of 1.0, got none"):
        shrink(model, structure, keep)


def test_a_table_that_is_wrong_is_refused():
    """Of two neurons the reader is told in the wrong order; then a reader is forgotten."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x, places = torch.randn(5, 3), torch.arange(4)
    entries = [
        Entry("0.weight", 0, places, "producer"),
        Entry("0.bias", 0, places, "follower"),
        Entry("2.weight", 1, places, "gate"),
    ]
    group = CoordinateGroup("0", "neuron", 0, 4)
    verify(model, Structure((group,), tuple(entries)), (x,))
    wrong = [*entries[:2], Entry("2.weight", 1, torch.tensor([1, 0, 3, 2]), "gate")]
    with pytest.raises(ValueError, match=r"removing some neurons of 0 cannot be done right, outputs .* ignored_layers"):
        verify(model, Structure((group,), tuple(wrong)), (x,))
    without_bias = [entries[0], entries[2]]
    with pytest.raises(ValueError, match="removing some neurons of 0 .* the smaller model raises RuntimeError"):
        verify(model, Structure((group,), tuple(without_bias)), (x,))
    with pytest.raises(ValueError, match="wanted a gate on every coordinate, got none on neuron 0 of 0"):
        Structure((group,), tuple(entries[:2]))
    with pytest.raises(ValueError, match="0.weight, dim 0: wanted coordinates from -1 to 3"):
        Structure((group,), (Entry("0.weight", 0, torch.tensor([4]), "producer"),))
    with pytest.raises(ValueError, match="one after the other from 0"):
        Structure((CoordinateGroup("0", "neuron", 1, 4),), ())


def chain(depth, wrong=()):
    """Linear layers, and their structure in which the readers of some are told in the wrong order."""
    torch.manual_seed(1)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(depth)), nn.Linear(6, 2))
    structure = find_structure(model, torch.randn(4, 6), check=False)
    readers = {f"{place + 1}.0.weight" for place in wrong}
    entries = [
        Entry(e.tensor, e.dim, e.index.roll(1) if e.role == "gate" and e.tensor in readers else e.index, e.role)
        for e in structure.entries
    ]
    return model, Structure(structure.groups, tuple(entries)), torch.randn(4, 6)


@pytest.mark.parametrize("wrong", [0, 6, 13, 14])
def test_the_guilty_one_of_many_is_named(wrong):
    model, structure, x = chain(16, [wrong])
    with pytest.raises(ValueError, match=rf"model: removing some neurons of {wrong}\.0 cannot be done right"):
        verify(model, structure, (x,))


def test_comparisons_grow_with_the_root_of_the_groups():
    """16 groups: all at once, then four times four of them; the model itself is called once before."""
    model, structure, x = chain(16)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    verify(model, structure, (x,))
    assert len(calls) == 1 + 2 * (1 + 4)
    calls.clear()
    verify(model, structure, (x,), single_groups=False)
    assert len(calls) == 1 + 2


class Compensated(nn.Module):
    """Reads two layers only where they are equally wide: removed from one alone, it raises."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        if a.shape != b.shape:
            raise RuntimeError("widths differ")
        return self.c(a) + self.d(b)


def test_what_all_groups_at_once_would_hide():
    """Widths agree while both lose as many: only alone does one of them show that they belong together."""
    model, x = Compensated(), torch.randn(3, 4)
    structure = find_structure(model, x, check=False)
    assert len(structure.groups) == 2
    verify(model, structure, (x,), single_groups=False)
    with pytest.raises(ValueError, match="removing some neurons of a cannot be done right, the smaller model raises"):
        verify(model, structure, (x,))
    with pytest.raises(
        ValueError, match="wanted channels, heads or neurons that can be removed, found none; .* a: cannot"
    ):
        find_structure(model, x, on_refusal="protect")


def test_protect_keeps_whole_what_is_wrong_and_says_so():
    model, structure, x = chain(9, [2, 5])
    left = proven(model, structure, (x,))
    assert [group.name for group in left.groups] == [f"{i}.0" for i in range(9) if i not in (2, 5)]
    assert all("cannot be removed, outputs" in left.protected[f"{i}.0"] for i in (2, 5))
    verify(model, left, (x,))


def test_protect_beside_groups_refused_by_name():
    """GroupNorm behind one convolution; all others go as they would without it."""
    body = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 5, 1), nn.ReLU()]
    model = nn.Sequential(*body, nn.Conv2d(5, 2, 1))
    x = torch.randn(2, 3, 9, 9)
    with pytest.raises(ValueError, match=r"outputs of 2 cannot be removed one by one, as they reach 3 \(GroupNorm\)"):
        find_structure(model, x)
    structure = find_structure(model, x, on_refusal="protect")
    assert [(group.name, group.size) for group in structure.groups] == [("0", 8), ("4", 5)]
    assert structure.protected["2"].startswith("cannot be removed one by one, it reaches 3 (GroupNorm)")
    with pytest.raises(ValueError, match="on_refusal: wanted one of raise, protect, got 'skip'"):
        find_structure(model, x, on_refusal="skip")


def test_zeros_of_a_fresh_model_hide_nothing():
    """The last norm of a branch starts at 0: what the branch computes would not be compared at all."""
    model = Residual()
    with torch.no_grad():
        model.b.weight.zero_()
        model.b.bias.zero_()
    structure = find_structure(model, torch.randn(2, 3, 8, 8))
    entries = [e for e in structure.entries if e.tensor != "a.weight"]
    flipped = [Entry(e.tensor, e.dim, e.index.flip(0), e.role) for e in structure.entries if e.tensor == "a.weight"]
    halves = [e if e.dim == 0 else Entry(e.tensor, 1, e.index.flip(0), e.role) for e in flipped]
    with pytest.raises(ValueError, match="cannot be done right, outputs of the smaller"):
        verify(model, Structure(structure.groups, (*entries, *halves)), (torch.randn(2, 3, 8, 8),))


def test_tied_weights_stay():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 5), nn.Linear(5, 3))
    model[2].weight = model[0].weight
    structure = find_structure(model, torch.randn(2, 6))
    assert [group.name for group in structure.groups] == ["4"]
    assert structure.protected["0"] == structure.protected["2"] == "tied weights"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype):
    model, x = mlp().to(dtype).eval(), torch.randn(3, 9, dtype=dtype)
    structure = find_structure(model, x)
    keep = torch.arange(structure.size) % 4 > 0
    smaller = shrink(model, structure, keep)
    assert {p.dtype for p in smaller.parameters()} == {dtype}
    tolerance = {torch.float64: 1e-14, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(gated_call(model, structure, keep, (x,)), smaller(x), rtol=tolerance, atol=tolerance)


def test_outputs_that_are_not_finite_prove_nothing():
    model, x = make("plain")
    with pytest.raises(ValueError, match="model: wanted finite outputs for the example inputs"):
        find_structure(model, x / 0)


def test_under_autocast():
    """Norms give fp32 there, with the statistics of what is kept as with those of all."""
    model, x = make("convnext")
    structure = find_structure(model, x)
    keep = torch.arange(structure.size) % 3 > 0
    with torch.autocast("cpu", torch.bfloat16):
        masked, shrunk = gated_call(model, structure, keep, (x,)), shrink(model, structure, keep)(x)
    torch.testing.assert_close(masked, shrunk, rtol=1e-2, atol=1e-2)


@pytest.mark.slow  # of other nets test_shrunk_deployed.py does it each time
def test_the_smaller_model_compiles_and_exports():
    model, x = make("squeeze-excite")
    structure = find_structure(model, x)
    smaller = shrink(model, structure, torch.arange(structure.size) % 3 > 0)
    with torch.no_grad():
        assert torch.equal(torch.export.export(smaller, (x,)).module()(x), smaller(x))
        compiled = torch.compile(smaller, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), smaller(x))


def test_a_compiled_model_is_the_one_within():
    model, x = make("plain")
    compiled = torch.compile(model, backend="eager")
    structure = find_structure(compiled, x)
    assert structure.groups == find_structure(model, x).groups
    keep = torch.arange(structure.size) % 2 == 0
    assert torch.equal(shrink(compiled, structure, keep)(x), shrink(model, structure, keep)(x))


def test_a_layer_whose_output_nobody_uses_fits_what_it_reads():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 1)
            self.aside, self.norm, self.head = nn.Conv2d(8, 5, 1), nn.BatchNorm2d(5), nn.Linear(6, 2)

        def forward(self, x):
            x = F.relu(self.a(x))
            self.norm(self.aside(x))
            return self.head(self.b(x).mean((2, 3)))

    model, x = Auxiliary().eval(), torch.randn(2, 3, 8, 8)
    structure = find_structure(model, x)
    assert [(group.name, group.size) for group in structure.groups] == [("a", 8), ("b", 6)]
    smaller = shrink(model, structure, torch.arange(14) % 2 == 0)
    assert smaller.aside.weight.shape == (5, 4, 1, 1)
    assert smaller.norm.num_features == 5
    assert smaller(x).shape == (2, 2)

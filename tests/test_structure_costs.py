"""What is predicted is what is counted after shrinking, and budgets are met as closely as coordinates allow."""

import itertools

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sfpk_kernels.structure import Costs, coordinate_sums, find_structure, select, shrink

from .snapshot import Snapshot
from .structured_nets import NETS, make

pytest.importorskip("torch_pruning")


def counted(model, x):
    """(parameters, MACs) by torch's own counter: two floating point operations are one MAC."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


@pytest.mark.parametrize("name", NETS)
def test_predicted_is_counted(name):
    model, x = make(name)
    structure = find_structure(model, x, check=False)
    model.train()
    snapshot = Snapshot(model)
    costs = Costs(model, structure, (x,))
    snapshot.check()
    model.eval()
    params, macs = counted(model, x)
    assert costs.dense == {"params": params, "macs": macs, "channels": structure.size}
    score = torch.rand(structure.size)
    for budget, sparsity in (("params", 0.4), ("macs", 0.5), ("channels", 0.6), ("macs", 0.0)):
        keep = select(structure, costs, score, sparsity, budget)
        smaller = shrink(model, structure, keep)
        params, macs = counted(smaller, x)
        assert (costs.cost(keep, "params"), costs.cost(keep, "macs")) == (params, macs)
        assert costs.cost(keep, budget) <= round((1 - sparsity) * costs.dense[budget])
        assert smaller(x).shape == model(x).shape


@pytest.mark.parametrize("budget", ["params", "macs", "channels"])
def test_nothing_more_fits(budget):
    """Whatever single coordinate is added, the budget is exceeded."""
    model, x = make("squeeze-excite")
    structure = find_structure(model, x, check=False)
    costs = Costs(model, structure, (x,))
    for seed, sparsity in itertools.product(range(3), (0.2, 0.5, 0.8)):
        score = torch.rand(structure.size, generator=torch.Generator().manual_seed(seed))
        keep = select(structure, costs, score, sparsity, budget)
        limit = round((1 - sparsity) * costs.dense[budget])
        assert costs.cost(keep, budget) <= limit
        for coordinate in (~keep).nonzero().flatten().tolist():
            more = keep.clone()
            more[coordinate] = True
            assert costs.cost(more, budget) > limit


def test_the_best_stay():
    """Of alike coordinates the removed ones score least; by hand for a budget in channels."""
    model, x = make("plain")
    structure = find_structure(model, x, check=False)
    costs = Costs(model, structure, (x,))
    score = torch.rand(structure.size)
    keep = select(structure, costs, score, 1 / 3, "channels")
    assert keep.sum() == 14
    assert score[keep].min() > score[~keep].max()
    for group in structure.groups:
        keep = select(structure, costs, score, 0.5, "macs")[group.span]
        assert keep.all() or score[group.span][keep].min() > score[group.span][~keep].max()
    ties = select(structure, costs, torch.ones(structure.size), 1 / 3, "channels")
    assert ties.nonzero().flatten().tolist() == [*range(13), 14]  # one of the last group stays, by the lower index


def test_no_layer_dies():
    """All scores of one group, and all that one of two added producers reads, are the worst."""
    for name in ("plain", "residual", "concat", "chunk added", "two groups"):
        model, x = make(name)
        structure = find_structure(model, x, check=False)
        costs = Costs(model, structure, (x,))
        for group in structure.groups:
            score = torch.rand(structure.size) + 1
            score[group.span] = 0
            keep = select(structure, costs, score, 0.3, "channels")
            assert keep[group.span].sum() >= 1
            assert shrink(model, structure, keep)(x).isfinite().all()


def test_floors_and_multiples():
    model, x = make("plain")
    structure = find_structure(model, x, check=False)
    costs = Costs(model, structure, (x,))
    for seed in range(5):
        score = torch.rand(structure.size, generator=torch.Generator().manual_seed(seed))
        keep = select(structure, costs, score, 0.6, "params", min_keep=3)
        assert min(int(keep[group.span].sum()) for group in structure.groups) >= 3
        for multiple in (2, 4):
            keep = select(structure, costs, score, 0.4, "macs", round_to=multiple)
            counts = [int(keep[group.span].sum()) for group in structure.groups]
            assert all(c % multiple == 0 or c == g.size for c, g in zip(counts, structure.groups, strict=True))
            assert costs.cost(keep, "macs") <= 0.6 * costs.dense["macs"] + 0.5


def test_shared_weights_count_once_as_parameters_and_twice_as_macs():
    model, x = make("shared")
    structure = find_structure(model, x, check=False)
    costs = Costs(model, structure, (x,))
    keep = torch.ones(structure.size, dtype=torch.bool)
    keep[6:10] = False  # 4 of the 8 channels that d both reads and computes
    lost = costs.dense["params"] - costs.cost(keep, "params")
    assert lost == (8 * 8 - 4 * 4) * 9 + 4 + 4 * 3 + 4 + 4 * 4  # d and its bias, c and its bias, the classifier
    lost = costs.dense["macs"] - costs.cost(keep, "macs")
    assert lost == 2 * 64 * (2 * (8 * 8 - 4 * 4) * 9 + 4 * 3) + 2 * 4 * 4


@pytest.mark.parametrize("name", ["residual", "squeeze-excite", "concat", "many groups", "two groups", "flatten"])
def test_sums_over_what_a_coordinate_governs(name):
    """By brute force: what is not in the model shrunk by one coordinate, of producers and consumers alike."""
    model, x = make(name)
    structure = find_structure(model, x, check=False)
    ones = {name: torch.ones_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
    everything = coordinate_sums(structure, ones, ("gate", "producer", "follower"))
    dense = sum(p.numel() for p in model.parameters())
    for coordinate in range(0, structure.size, 3):
        keep = torch.arange(structure.size) != coordinate
        lost = dense - sum(p.numel() for p in shrink(model, structure, keep).parameters())
        twice = sum(
            int((one.index == coordinate).sum()) * int((other.index == coordinate).sum()) * parameter[0, 0].numel()
            for tensor, entries in structure.by_tensor().items()
            if len(entries) == 2
            for one, other, parameter in [(*entries, model.get_parameter(tensor))]
        )
        assert everything[coordinate] == lost + twice  # what the coordinate both reads and computes
    weights = {name: p.abs() for name, p in model.named_parameters()}
    expected = weights["stem.weight"].sum((1, 2, 3)) if name == "residual" else None
    if expected is not None:
        expected = expected + weights["b.weight"].sum((1, 2, 3)) + weights["a.weight"].sum((0, 2, 3))
        expected = expected + weights["head.fc.weight"].sum(0)
        torch.testing.assert_close(coordinate_sums(structure, weights)[:8], expected)
    with pytest.raises(ValueError, match="roles: wanted some of"):
        coordinate_sums(structure, weights, ("gates",))
    with pytest.raises(ValueError, match="values: wanted at least one tensor"):
        coordinate_sums(structure, {})
    tensor = structure.entries[0].tensor
    with pytest.raises(ValueError, match=rf"values: wanted {tensor} with \d+ positions along dim \d, got shape \(3,\)"):
        coordinate_sums(structure, {tensor: torch.ones(3)}, ("gate", "producer", "follower"))


def test_bad_arguments():
    model, x = make("plain")
    structure = find_structure(model, x, check=False)
    costs = Costs(model, structure, (x,))
    score = torch.rand(structure.size)
    with pytest.raises(ValueError, match="budget: wanted one of .*, got 'weights'"):
        select(structure, costs, score, 0.5, "weights")
    with pytest.raises(ValueError, match="sparsity: wanted a number from 0 up to"):
        select(structure, costs, score, 1.0)
    with pytest.raises(ValueError, match=r"score: wanted a tensor of shape \(21,\), got \(20,\)"):
        select(structure, costs, score[:20], 0.5)
    with pytest.raises(ValueError, match="score: wanted finite values"):
        select(structure, costs, score / 0, 0.5)
    with pytest.raises(ValueError, match="min_keep: wanted ≥ 1"):
        select(structure, costs, score, 0.5, min_keep=0)
    with pytest.raises(TypeError, match="round_to: wanted an integer ≥ 1, got 1.5"):
        select(structure, costs, score, 0.5, round_to=1.5)
    with pytest.raises(ValueError, match=r"sparsity: wanted at most 0\.\d+ of the channels, .* got 0.9"):
        select(structure, costs, score, 0.9, "channels", min_keep=2)
    with pytest.raises(ValueError, match="budget: wanted one of"):
        costs.cost(torch.ones(21, dtype=torch.bool), "flops")


def test_a_model_in_which_a_hook_fails_has_no_hooks_left():
    model, x = make("plain")
    structure = find_structure(model, x, check=False)

    class Failing(nn.Module):
        def forward(self, x):
            raise RuntimeError("here")

    model.append(Failing())
    with pytest.raises(RuntimeError, match="here"):
        Costs(model, structure, (x,))
    assert not any(module._forward_hooks for module in model.modules())

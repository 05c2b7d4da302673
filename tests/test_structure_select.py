"""Selections for a budget are those of the plain way, coordinate for coordinate."""

import pytest
import torch
from torch import nn

from sfpk_kernels.structure import CoordinateGroup, Costs, Entry, Structure, find_structure
from sfpk_kernels.structure._ranking import from_the_best
from sfpk_kernels.structure.limits import limits_of
from sfpk_kernels.structure.select import check_ceilings, select_within

from . import plain_select
from .structured_nets import NETS, make

pytest.importorskip("torch_pruning")


def scores(size, generator):
    """Different ones, many equal ones, equal but for a few, one group far above the others, NaN-free infinities."""
    yield torch.rand(size, generator=generator)
    yield torch.randint(4, (size,), generator=generator).float() - 1
    yield torch.ones(size).scatter(0, torch.randint(size, (3,), generator=generator), 2.0)
    yield torch.rand(size, generator=generator) + 10 * (torch.arange(size) < size // 3)
    yield torch.rand(size, generator=generator).half()
    yield torch.where(torch.rand(size, generator=generator) < 0.3, torch.inf, -torch.inf)


def limits(structure, generator, min_keep, round_to, ranged):
    """Some of ``ranged`` groups, in thirds, have floors and ceilings of their own, as far as these are possible."""
    found, ranges = limits_of(structure, min_keep, round_to), {}
    for group in structure.groups:
        if int(torch.randint(3, (), generator=generator)) < ranged:
            low, high = torch.rand(2, generator=generator).sort().values.tolist()
            lowest = [1 - count / group.size for count in range(group.size + 1)]
            # A range, a count of its own, or the lowest of all ceilings.
            tried = ([(low, high)], [(high, high)], [(one, 1.0) for one in lowest])
            for one in tried[int(torch.randint(3, (), generator=generator))]:
                try:
                    found = limits_of(structure, min_keep, round_to, ranges | {group.name: one})
                except ValueError:
                    continue
                ranges[group.name] = one
                break
    return found


def compare(structure, costs, score, budget, wanted, generator):
    limit = round(float(torch.rand((), generator=generator)) * costs.dense[budget])
    options = (structure, costs, score, limit, budget, wanted)
    assert torch.equal(select_within(*options), plain_select.select_within(*options)), options[3:]


@pytest.mark.parametrize("name", NETS)
def test_the_same_coordinates(name):
    model, x = make(name)
    structure = find_structure(model, x, check=False)
    costs = Costs(model, structure, (x,))
    generator = torch.Generator().manual_seed(7)
    for score in scores(structure.size, generator):
        for budget in ("params", "macs", "channels"):
            for min_keep, round_to, ranged in ((1, 1, 0), (3, 1, 2), (1, 4, 0), (2, 3, 2), (1, 1, 3)):
                wanted = limits(structure, generator, min_keep, round_to, ranged)
                compare(structure, costs, score, budget, wanted, generator)


@pytest.mark.parametrize("size", [1, 2, 500, 20_000])
def test_the_order_is_stable(size):
    generator = torch.Generator().manual_seed(7)
    zeros = torch.where(torch.rand(size, generator=generator) < 0.5, 0.0, -0.0)
    for score in (*scores(size, generator), zeros, torch.full((size,), torch.nan)):
        wide = score.double()
        assert from_the_best(wide).tolist() == wide.argsort(descending=True, stable=True).tolist()


@pytest.mark.parametrize("name", NETS)
def test_costs_by_class_are_costs(name):
    model, x = make(name)
    structure = find_structure(model, x, check=False)
    costs = Costs(model, structure, (x,))
    generator = torch.Generator().manual_seed(7)
    keeps = torch.rand(9, structure.size, generator=generator) < torch.linspace(0, 1, 9)[:, None]
    of = torch.from_numpy(costs.counting.of)
    counts = torch.zeros(9, costs.counting.classes, dtype=torch.int64).index_add_(1, of, keeps.long())
    for budget in costs.dense:
        wanted = [costs.cost(keep, budget) for keep in keeps]
        assert costs.counting.costs(counts.numpy(), budget).tolist() == wanted


class Pieces(nn.Module):
    """Linear layers that know nothing of one another."""

    def __init__(self, shapes):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(inputs, outputs, bias=False) for outputs, inputs in shapes)

    def forward(self, x):
        return sum(layer(x.new_ones(1 + i, layer.in_features)).sum() for i, layer in enumerate(self.layers))


def scattered(generator):
    """Groups that many dims have parts of, in any order, some positions twice or always kept."""

    def below(high, low=1):
        return int(torch.randint(low, high, (), generator=generator))

    sizes = [below(9) for _ in range(below(6))]
    size = sum(sizes)
    indices = [torch.arange(size)]  # a gate on everything, so that each coordinate is read
    for _ in range(below(9)):
        indices.append(torch.randint(-1 if below(3) == 1 else 0, size, (below(size + 3),), generator=generator))
    roles = ["gate", *("producer" if below(4) > 1 else "follower" for _ in indices[1:])]
    free = 1 + len(indices) % 2
    shapes = [(len(one), len(other)) for one, other in zip(indices[1::2], indices[2::2], strict=False)]
    rows = [(free, size), *shapes]
    entries = [Entry("layers.0.weight", 1, indices[0], "gate")]
    for i in range(len(shapes)):
        for dim, at in ((0, 2 * i + 1), (1, 2 * i + 2)):
            entries.append(Entry(f"layers.{i + 1}.weight", dim, indices[at], roles[at]))
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    groups = tuple(CoordinateGroup(f"g{i}", "neuron", a, b) for i, (a, b) in enumerate(zip(starts, sizes, strict=True)))
    return Structure(groups, tuple(entries)), Pieces(rows)


@pytest.mark.parametrize("seed", range(40))
def test_groups_that_dims_have_parts_of(seed):
    generator = torch.Generator().manual_seed(seed)
    structure, model = scattered(generator)
    costs = Costs(model, structure, (torch.ones(1),))
    for score in (torch.rand(structure.size, generator=generator), torch.ones(structure.size)):
        for budget in ("params", "macs", "channels"):
            for min_keep, round_to, ranged in ((1, 1, 0), (2, 3, 2), (1, 2, 1), (1, 1, 3), (1, 2, 3), (1, 1, 3)):
                wanted = limits(structure, generator, min_keep, round_to, ranged)
                compare(structure, costs, score, budget, wanted, generator)


@pytest.mark.parametrize("seed", range(20))
def test_ceilings_are_refused_where_they_cost_less_than_the_budget(seed):
    generator = torch.Generator().manual_seed(seed)
    structure, model = scattered(generator)
    costs = Costs(model, structure, (torch.ones(1),))
    for budget in ("params", "macs", "channels"):
        wanted = limits(structure, generator, 1, 1 + seed % 3, 3)
        dense, most = costs.dense[budget], plain_select.most(structure, costs, budget, wanted.loosened(structure))
        check_ceilings(structure, costs, 1 - most / dense, budget, wanted, None)
        if most < dense:
            with pytest.raises(ValueError, match="^sparsity: wanted at least "):
                check_ceilings(structure, costs, 1 - (most + 1) / dense, budget, wanted, None)


def test_the_scattered_ones_are_what_nets_are_not():
    """Several classes in a group, classes of several groups that are alike, dims that a group alone does not keep.

    Ceilings, and ones that take the place of others that kept a layer alive.
    """
    split = alike = narrow = ceilings = replaced = 0
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        structure, model = scattered(generator)
        counting = Costs(model, structure, (torch.ones(1),)).counting
        split += counting.classes > len(structure.groups)
        alike += len(set(counting.alike.tolist())) < counting.classes
        narrow += len(structure.narrow) > 0
        wanted = limits(structure, generator, 1, 1, 3)
        ceilings += any(most < group.size for most, group in zip(wanted.most, structure.groups, strict=True))
        score = torch.rand(structure.size, generator=generator)
        replaced += plain_select.Ranking(structure, score, wanted).replaced > 0
    assert min(split, alike, narrow, ceilings, replaced) >= 5, (split, alike, narrow, ceilings, replaced)

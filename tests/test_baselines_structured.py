"""Structured baselines: their scores by hand, budgets as counted on the shrunk model, the model untouched."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sfpk_kernels.baselines import structured_magnitude, structured_random, structured_snip
from sfpk_kernels.search.unreached import NoGradientError
from sfpk_kernels.structure import find_structure

from .snapshot import Snapshot
from .structured_nets import make

pytest.importorskip("torch_pruning")


class Words(nn.Module):
    """An Embedding whose width is pruned, as are the neurons behind it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.embedding, self.inner, self.head = nn.Embedding(11, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.inner(self.embedding(x))).mean(1))


def images(batches=3, classes=4):
    generator = torch.Generator().manual_seed(4)
    return [
        (torch.randn(4, 3, 8, 8, generator=generator), torch.randint(classes, (4,), generator=generator))
        for _ in range(batches)
    ]


def best(structure, score, count):
    """The best of all, one of every group at least; by hand, as every layer here has a group of its own."""
    keep = torch.zeros(structure.size, dtype=torch.bool)
    for group in structure.groups:
        keep[group.first + int(score[group.span].argmax())] = True
    for coordinate in score.argsort(descending=True).tolist():
        if int(keep.sum()) < count:
            keep[coordinate] = True
    return keep


def of_plain(weights):  # of each layer, ≥ 0 → sums over what computes and what reads each of 8 + 6 + 7 channels
    first, second, third, last = (weight.double() for weight in weights)
    return torch.cat([
        first.sum((1, 2, 3)) + second.sum((0, 2, 3)), second.sum((1, 2, 3)) + third.sum((0, 2, 3)),
        third.sum((1, 2, 3)) + last.sum(0),
    ])  # fmt: skip


def layers(model):
    return [module.weight for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("allocation", ["global", "normalized"])
def test_magnitude_by_hand(norm, allocation):
    model, x = make("plain")
    with torch.no_grad():
        for factor, weight in zip((1, 3, 0.3, 5), layers(model), strict=True):
            weight.mul_(factor)  # so that it matters what is compared with what
    weights = [w.detach() for w in layers(model)]
    score = of_plain([w.abs() for w in weights]) if norm == "l1" else of_plain([w.square() for w in weights]).sqrt()
    if allocation == "normalized":
        score = torch.cat([part / part.mean() for part in score.split([8, 6, 7])])
    found = structured_magnitude(model, 1 / 3, example_inputs=x, norm=norm, allocation=allocation, budget="channels")
    assert torch.equal(found.keep, best(found.structure, score, 14))
    assert found.left["channels"] == 14
    assert found.dense["channels"] == 21


def test_uniform_takes_the_same_fraction_of_every_group():
    model, x = make("plain")
    with torch.no_grad():
        layers(model)[0].mul_(100)
    for found in (
        structured_magnitude(model, 0.5, example_inputs=x, allocation="uniform", budget="channels"),
        structured_random(model, 0.5, example_inputs=x, allocation="uniform", budget="channels"),
    ):
        counts = [int(found.keep[group.span].sum()) for group in found.structure.groups]
        assert counts[:2] == [4, 3]
        assert counts[2] in (3, 4)
    score = of_plain([w.detach().abs() for w in layers(model)])
    keep = structured_magnitude(model, 0.5, example_inputs=x, allocation="uniform", budget="channels").keep
    for part, kept in zip(score.split([8, 6, 7]), keep.split([8, 6, 7]), strict=True):
        assert part[kept].min() > part[~kept].max()


def test_snip_by_hand():
    """Sums of |θ ∂L/∂θ|, the mean over batches, with batch statistics."""
    model, x = make("plain")
    spare = copy.deepcopy(model).train()
    score = torch.zeros(21, dtype=torch.float64)
    for images_, labels in images():
        gradients = torch.autograd.grad(F.cross_entropy(spare(images_), labels), layers(spare))
        score += of_plain([(w * g).detach().abs() for w, g in zip(layers(spare), gradients, strict=True)])
    found = structured_snip(
        model, images(), 2 / 3, example_inputs=x, budget="channels", sensitivity="weights", allocation="global"
    )
    assert torch.equal(found.keep, best(found.structure, score, 7))
    few = structured_snip(model, images(), 2 / 3, example_inputs=x, budget="channels", max_batches=1)
    same = structured_snip(model, images(1), 2 / 3, example_inputs=x, budget="channels")
    assert torch.equal(few.keep, same.keep)


def test_snip_of_gates_by_hand():
    """|∂L/∂keep| of factors written between the layers of an MLP."""
    model, x = make("mlp")
    batches = [(torch.randn(5, 9), torch.randint(4, (5,))) for _ in range(3)]
    spare = copy.deepcopy(model).train()
    places = [3, 6, 9]  # layers that read what is removed
    score = torch.zeros(38, dtype=torch.float64)
    for inputs, labels in batches:
        gates = [torch.ones(width, requires_grad=True) for width in (16, 12, 10)]
        y = inputs
        for i, module in enumerate(spare):
            y = module(y * gates[places.index(i)] if i in places else y)
        score += torch.cat(torch.autograd.grad(F.cross_entropy(y, labels), gates)).double().abs()
    options = {"example_inputs": x, "budget": "channels", "allocation": "global"}
    found = structured_snip(model, batches, 0.5, **options)
    assert torch.equal(found.keep, best(found.structure, score, 19))
    assert not torch.equal(found.keep, structured_snip(model, batches, 0.5, sensitivity="weights", **options).keep)


def test_embeddings_count():
    model = Words()
    x = torch.randint(11, (4, 5))
    labels = torch.randint(3, (4,))
    weights = [model.embedding.weight, model.inner.weight, model.head.weight]
    gradients = torch.autograd.grad(F.cross_entropy(model(x), labels), weights)
    a, b, c = ((w * g).detach().abs().double() for w, g in zip(weights, gradients, strict=True))
    parts = a.sum(0) + b.sum(0), b.sum(1) + c.sum(0)
    score = torch.cat([part / part.mean() for part in parts])
    found = structured_snip(model, [(x, labels)], 0.5, example_inputs=x, budget="channels", sensitivity="weights")
    assert [group.size for group in found.structure.groups] == [8, 6]
    assert torch.equal(found.keep, best(found.structure, score, 7))


def every(model, x, batches, sparsity, **options):
    """Each of them with the same options."""
    return {
        "magnitude": structured_magnitude(model, sparsity, example_inputs=x, **options),
        "snip": structured_snip(model, batches, sparsity, example_inputs=x, **options),
        "random": structured_random(model, sparsity, example_inputs=x, **options),
    }


@pytest.mark.parametrize("name", ["plain", "residual", "squeeze-excite"])
@pytest.mark.parametrize(("budget", "sparsity"), [("macs", 0.5), ("params", 0.6), ("channels", 0.4)])
def test_budgets_are_met_as_counted_on_the_shrunk_model(name, budget, sparsity):
    model, x = make(name)
    model.train()
    snapshot = Snapshot(model)
    structure = find_structure(model, x)
    for found in every(model, x, images(1), sparsity, budget=budget, structure=structure).values():
        smaller = found.shrink(model).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            smaller(x)
        assert found.left["macs"] == counter.get_total_flops() // 2
        assert found.left["params"] == sum(p.numel() for p in smaller.parameters())
        assert found.dense["params"] == sum(p.numel() for p in model.parameters())
        limit = round((1 - sparsity) * found.dense[budget])
        assert found.left[budget] <= limit
        for coordinate in (~found.keep).nonzero().flatten().tolist():  # and nothing more fits
            more = found.keep.clone()
            more[coordinate] = True
            bigger = type(found)(more, structure, found.dense, found.left).shrink(model).eval()
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                bigger(x)
            costs = {
                "macs": counter.get_total_flops() // 2,
                "params": sum(p.numel() for p in bigger.parameters()),
                "channels": int(more.sum()),
            }
            assert costs[budget] > limit
    snapshot.check()


def test_options_reach_structure_and_selection():
    model, x = make("plain")
    for found in every(model, x, images(1), 0.3, ignored_layers=["1.0"], min_keep=4, round_to=2).values():
        assert [group.name for group in found.structure.groups] == ["0.0", "3.0"]
        counts = [int(found.keep[group.span].sum()) for group in found.structure.groups]
        assert all(count >= 4 and (count % 2 == 0 or count == 7) for count in counts)


def test_random_repeats_with_its_seed_and_leaves_the_generator_alone():
    model, x = make("residual")
    structure = find_structure(model, x)
    state = torch.get_rng_state()
    keeps = [
        structured_random(model, 0.5, example_inputs=x, structure=structure, seed=seed).keep for seed in (1, 1, 2, 3)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(keeps[0], keeps[1])
    assert not all(torch.equal(keeps[0], keep) for keep in keeps[2:])
    often = sum(
        structured_random(model, 0.5, example_inputs=x, structure=structure, seed=seed, budget="channels").keep.double()
        for seed in range(100)
    )
    assert (often / 100 - 0.5).abs().max() < 0.2  # nobody is preferred: 7 of 14, standard deviation 0.05


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_other_dtypes(kind):
    model, x = make("plain")
    model.to(kind)
    batches = [(a.to(kind), b) for a, b in images(1)]
    for found in every(model, x.to(kind), batches, 0.5).values():
        smaller = found.shrink(model)
        assert smaller(x.to(kind)).isfinite().all()
        assert found.left["macs"] <= found.dense["macs"] / 2 + 0.5


def test_bad_arguments_are_named_and_the_model_is_as_it_was():
    model, x = make("plain")
    other, _ = make("residual")
    snapshot = Snapshot(model)
    structure = find_structure(other, x)
    data = images(1)

    def magnitude(sparsity=0.5, **options):
        return structured_magnitude(model, sparsity, **{"example_inputs": x, **options})

    def snip(loader=data, **options):
        return structured_snip(model, loader, 0.5, example_inputs=x, **options)

    for call, error, words_ in (
        (lambda: magnitude(norm="l0"), ValueError, "norm: wanted one of l1, l2, got 'l0'"),
        (lambda: magnitude(budget="flops"), ValueError, "budget: wanted one of params, macs, channels, got 'flops'"),
        (lambda: magnitude(allocation="erk"), ValueError, "allocation: wanted one of global, normalized, uniform, got"),
        (lambda: magnitude(1.0), ValueError, "sparsity: wanted a number in \\(0, 1\\), got 1.0"),
        (lambda: magnitude("half"), TypeError, "sparsity: wanted a number in"),
        (lambda: magnitude(min_keep=0), ValueError, "min_keep: wanted ≥ 1, got 0"),
        (lambda: magnitude(round_to=1.5), TypeError, "round_to: wanted an integer ≥ 1, got 1.5"),
        (lambda: magnitude(example_inputs="x"), TypeError, "example_inputs: wanted a tensor, a tuple"),
        (lambda: magnitude(structure=3), TypeError, "structure: wanted a Structure or None, got int"),
        (lambda: magnitude(structure=structure), ValueError, "structure: wanted one of this model, got one of .*stem"),
        (lambda: magnitude(structure=structure, check=False), TypeError, "check: wanted only without structure="),
        (lambda: magnitude(0.999, min_keep=4), ValueError, "sparsity: wanted at most"),
        (lambda: magnitude(pattern=(2, 4)), TypeError, "pattern"),
        (lambda: structured_magnitude(3, 0.5, example_inputs=x), TypeError, "model: wanted an nn.Module, got int"),
        (lambda: structured_magnitude(model, 0.5, x), TypeError, "wanted structured_magnitude\\(model, sparsity"),
        (lambda: snip(sensitivity="loss"), ValueError, "sensitivity: wanted one of weights, gate, got 'loss'"),
        (lambda: snip([]), ValueError, "loader: wanted batches, got an empty iterable"),
        (lambda: snip(3), TypeError, "loader: wanted an iterable of batches"),
        (lambda: snip(loss_fn=3), TypeError, "loss_fn: wanted a function"),
        (lambda: snip(loss_fn=lambda m, b: m(b[0]).sum() * 0), NoGradientError, "gradient"),
        (lambda: snip(loss_fn=lambda m, b: m(b[0]).sum() / 0), FloatingPointError, "loss_fn: wanted a finite loss"),
        (lambda: structured_random(model, 0.5, example_inputs=x, seed=-1), ValueError, "seed: wanted ≥ 0, got -1"),
        (
            lambda: structured_random(model, 0.5, example_inputs=x, allocation="normalized"),
            ValueError,
            "allocation: wanted one of global, uniform, got 'normalized'",
        ),
    ):
        with pytest.raises(error, match=words_):
            call()
    with torch.no_grad():
        layers(model)[1][0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="model: wanted finite"):
        magnitude()
    with torch.no_grad():
        layers(model)[1].copy_(snapshot.values["1.0.weight"])
    snapshot.check()

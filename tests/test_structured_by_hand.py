"""A structured run against a plain loop in fp64, and its masks against others at the same budget."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sfpk_kernels import SFPKConfig, SFPKPruner, prune
from sfpk_kernels.search.schedule import density_schedule
from sfpk_kernels.structure import Costs, coordinate_sums, find_structure, gated_call, select

from .test_step_length import by_angle, by_effective_dimension, moved_by_hand

pytest.importorskip("torch_pruning")

FIRST, SECOND, SIZE, CLASSES = 6, 5, 8, 4


class Small(nn.Module):
    """Two convolutions and a classifier."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, FIRST, 3, padding=1), nn.Conv2d(FIRST, SECOND, 3, padding=1)
        self.fc = nn.Linear(SECOND, CLASSES)

    def forward(self, x):
        return self.fc(torch.tanh(self.b(torch.tanh(self.a(x)))).mean((2, 3)))


def gated(model, keep, x):
    """Channels are multiplied where they are read."""
    first = torch.tanh(model.a(x)) * keep[:FIRST, None, None]
    second = torch.tanh(model.b(first)).mean((2, 3)) * keep[FIRST:]
    return model.fc(second)


def macs(keep):
    first, second = int(keep[:FIRST].sum()), int(keep[FIRST:].sum())
    return SIZE * SIZE * 9 * (3 * first + first * second) + second * CLASSES


def parameters(keep):
    first, second = int(keep[:FIRST].sum()), int(keep[FIRST:].sum())
    return 28 * first + (9 * first + 1) * second + (second + 1) * CLASSES


def best(score, limit, cost):
    """The best of each group, then all others in order as long as they fit."""
    keep = torch.zeros(len(score), dtype=torch.bool)
    keep[score[:FIRST].argmax()] = True
    keep[FIRST + score[FIRST:].argmax()] = True
    for c in score.argsort(descending=True, stable=True).tolist():
        more = keep.clone()
        more[c] = True
        keep = more if cost(more) <= limit else keep
    return keep


def saliency_of(model):
    """Σ|w| of what computes a channel and of what reads it, over its group's mean."""
    a, b, fc = (layer.weight.detach().abs() for layer in (model.a, model.b, model.fc))
    first = a.sum((1, 2, 3)) + b.sum((0, 2, 3))
    second = b.sum((1, 2, 3)) + fc.sum(0)
    return torch.cat([first / first.mean(), second / second.mean()])


@pytest.mark.parametrize(("budget", "cost"), [("macs", macs), ("params", parameters), ("channels", torch.sum)])
@pytest.mark.parametrize("length", [by_angle, by_effective_dimension])
@pytest.mark.parametrize("signed", [True, False])
def test_a_run_follows_the_plain_loop(budget, cost, length, signed):
    torch.manual_seed(4)
    steps, sparsity = 8, 0.6
    model = Small().double()
    data = [(torch.randn(8, 3, SIZE, SIZE).double(), torch.randint(0, CLASSES, (8,))) for _ in range(steps)]
    dense = int(cost(torch.ones(FIRST + SECOND, dtype=torch.bool)))
    density, saliency = density_schedule("cubic", 1 - sparsity, steps), saliency_of(model)
    m, shares, energies = torch.ones(FIRST + SECOND, dtype=torch.float64), [], []

    def score(m):
        return (m if signed else m.abs()) * saliency

    for k, (x, y) in enumerate(data):
        keep = best(score(m), round(density[k] * dense), cost).double().requires_grad_()
        loss = F.cross_entropy(gated(model, keep, x), y)
        (gradient,) = torch.autograd.grad(loss, keep)
        energies.append(float(loss.detach()))
        shares.append(float(gradient.square().sum() ** 2 / (len(m) * gradient.pow(4).sum())))
        m = moved_by_hand(m, gradient, length(k, steps, 1 - sparsity, shares), density[k + 1])
    config = SFPKConfig(
        sparsity, granularity="channel", budget=budget, n_steps=steps, hold=1.0, signed_score=signed,
        step_length="angle" if length is by_angle else "effective_dimension",
    )  # fmt: skip
    result = SFPKPruner(model, config=config, example_inputs=(data[0][0][:1],)).run(data)
    torch.testing.assert_close(result.particles[0], m, rtol=1e-9, atol=1e-12)
    assert [record.energy for record in result.history] == pytest.approx(energies, rel=1e-9)
    assert torch.equal(result.keep, best(score(m), round((1 - sparsity) * dense), cost))
    assert result.costs_after[budget] == int(cost(result.keep))
    assert result.costs_before[budget] == dense


def test_at_full_density_everything_is_kept_and_below_the_least_the_fewest():
    torch.manual_seed(4)
    pruner = SFPKPruner(
        Small(), config=SFPKConfig(0.5, granularity="channel", budget="macs"), example_inputs=torch.randn(1, 3, 8, 8)
    )
    polarizer, ones = pruner._run.polarizer, torch.ones(2, FIRST + SECOND)
    kept = polarizer.polarize(ones, torch.tensor([1.0, 1e-6]), "mask").values
    assert kept[0].all()
    assert kept[1].tolist() == [c in (0, FIRST) for c in range(FIRST + SECOND)]  # ties: the first of each group


class Classifier(nn.Module):
    def __init__(self, width=10):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.c, self.fc = nn.Conv2d(width, width, 3, padding=1), nn.Linear(width * 4, 8)

    def forward(self, x):
        x = F.relu(self.b(F.relu(self.a(x))))
        return self.fc(F.adaptive_avg_pool2d(F.relu(self.c(F.max_pool2d(x, 2))), 2).flatten(1))


def task(seed):
    """Eight patterns under noise."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(8, 1, 8, 8, generator=generator)

    def batch(size):
        y = torch.randint(0, 8, (size,), generator=generator)
        return patterns[y] + 1.2 * torch.randn(size, 1, 8, 8, generator=generator), y

    return batch


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_its_masks_lose_less_than_magnitude_and_random_ones(seed):
    lost = {}
    torch.manual_seed(seed)
    batch, model = task(seed), Classifier()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(80):
        x, y = batch(64)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.eval()
    x, y = batch(500)
    example = x[:1]
    config = SFPKConfig(0.6, granularity="channel", budget="macs", n_steps=80)
    result = prune(model, [batch(64) for _ in range(20)], config=config, example_inputs=example)
    structure = find_structure(model, example)
    costs = Costs(model, structure, (example,))
    norms = coordinate_sums(structure, {name: p.abs() for name, p in model.named_parameters()})
    keeps = {
        "sfpk": result.keep,
        "magnitude": select(structure, costs, norms, 0.6, "macs"),
        "random": select(structure, costs, torch.rand(structure.size), 0.6, "macs"),
    }
    with torch.no_grad():
        for name, keep in keeps.items():
            assert costs.cost(keep, "macs") <= round(0.4 * costs.dense["macs"])
            loss = float(F.cross_entropy(gated_call(model, structure, keep, (x,)), y))
            assert math.isfinite(loss)
            lost[name] = loss
    assert lost["sfpk"] < min(lost["magnitude"], lost["random"]), lost

"""Learned straight-through masks: against the same rule by autograd, and where the learning rate ends."""

import pytest
import torch
from torch import nn

from sfpk_kernels import Coordinates, baselines
from sfpk_kernels.baselines.select import select

from .snapshot import Snapshot


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_without_learning_it_is_magnitude_under_the_same_prior(convnet, images, optimizer):
    options = {"optimizer": optimizer, "passes": 6, "lr": 1e-30}
    assert baselines.ste(convnet, images, 0.8, prior="magnitude", **options) == baselines.magnitude(convnet, 0.8)
    coordinates = Coordinates(convnet)
    normalized = select(coordinates, coordinates.normalize_(coordinates.flatten(convnet).abs()), 0.8)
    assert baselines.ste(convnet, images, 0.8, **options) == normalized
    assert baselines.ste(convnet, images, 0.8, optimizer=optimizer, passes=6) != normalized


def by_autograd(model, batches, sparsity, optimizer, passes, lr):
    """The method as its docstring says it, with torch's optimizers and a straight-through top-k."""
    weights = [model[0].weight.detach(), model[2].weight.detach()]
    theta = torch.cat([w.flatten() for w in weights])
    prior = torch.cat([(w.abs() / w.abs().mean()).flatten() for w in weights])
    m = nn.Parameter(torch.ones_like(theta))
    rule = torch.optim.SGD([m], lr, momentum=0.9) if optimizer == "sgd" else torch.optim.Adam([m], lr, eps=1e-12)
    for k in range(passes):
        progress = min(1.0, k / round(0.7 * passes))
        density = 1 - sparsity + sparsity * (1 - progress) ** 3
        hard = torch.zeros_like(theta)
        hard[(m * prior).detach().topk(round(density * theta.numel())).indices] = 1
        first, second = (theta * (hard + m - m.detach())).split([w.numel() for w in weights])
        named = {"0.weight": first.view_as(weights[0]), "2.weight": second.view_as(weights[1])}
        x, y = batches[k % len(batches)]
        rule.zero_grad()
        nn.functional.cross_entropy(torch.func.functional_call(model, named, (x,)), y).backward()
        if optimizer == "sgd":
            m.grad /= m.grad.square().mean().sqrt()
        rule.param_groups[0]["lr"] = lr * (1 - k / passes)
        rule.step()
    mask = torch.zeros_like(theta, dtype=torch.bool)
    mask[(m * prior).detach().topk(round((1 - sparsity) * theta.numel())).indices] = True
    return mask


@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 0.02), ("adam", 0.05)])
def test_it_is_the_rule_written_with_autograd(mlp, vectors, optimizer, lr):
    expected = by_autograd(mlp.double(), [(x.double(), y) for x, y in vectors], 0.7, optimizer, 25, lr)
    found = baselines.ste(mlp, [(x.double(), y) for x, y in vectors], 0.7, optimizer=optimizer, passes=25, lr=lr)
    assert torch.equal(found.flat(), expected)
    assert found.kept == round(0.3 * 144)


def test_it_learns():
    model, x = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 2)), torch.randn(512, 20)
    y = (x[:, 0] * x[:, 1] > 0).long()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    batches = [(x[i : i + 64], y[i : i + 64]) for i in range(0, 512, 64)]

    def loss(masks):
        kept = {name: model.get_parameter(name).detach() * masks[name] for name in masks}
        return nn.functional.cross_entropy(torch.func.functional_call(model, kept, (x,)), y).item()

    assert loss(baselines.ste(model, batches, 0.9, passes=100)) < 0.5 * loss(baselines.magnitude(model, 0.9))


def test_the_seed_orders_the_loader_and_nothing_else_is_drawn(mlp, vectors):
    loader = torch.utils.data.DataLoader(vectors, batch_size=None, shuffle=True)
    before = torch.get_rng_state()
    first = baselines.ste(mlp, loader, 0.7, passes=30)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert first == baselines.ste(mlp, loader, 0.7, passes=30)
    assert first != baselines.ste(mlp, loader, 0.7, passes=30, seed=1)


def test_the_model_is_not_changed(convnet, images):
    snapshot = Snapshot(convnet)
    baselines.ste(convnet, images, 0.8, passes=5)
    with pytest.raises(FloatingPointError, match="loss_fn: wanted a finite loss, got nan in batch 1"):
        baselines.ste(convnet, [images[0], (images[1][0] * float("nan"), images[1][1])], 0.8, passes=5)
    snapshot.check()


def test_bad_input_is_named(mlp, vectors):
    for options, words in (
        ({"optimizer": "lbfgs"}, "optimizer: wanted one of sgd, adam, got 'lbfgs'"),
        ({"prior": "random"}, "prior: wanted one of normalized, magnitude, got 'random'"),
        ({"passes": 0}, "passes: wanted ≥ 1, got 0"),
        ({"lr": 0.0}, "lr: wanted a finite number > 0, got 0.0"),
        ({"seed": -1}, "seed: wanted ≥ 0, got -1"),
        ({"loss_fn": lambda net, batch: net(batch[0]).sum() * 0, "passes": 2}, "loss_fn: wanted a loss that changes"),
    ):
        with pytest.raises(ValueError, match=words):
            baselines.ste(mlp, vectors, 0.5, **options)
    with pytest.raises(TypeError, match="passes: wanted an integer ≥ 1, got 2.5"):
        baselines.ste(mlp, vectors, 0.5, passes=2.5)
    with pytest.raises(ValueError, match=r"loader: wanted 12 batches \(passes\), got a one-shot iterator that ended"):
        baselines.ste(mlp, iter(vectors), 0.5, passes=12)
    with pytest.raises(ValueError, match="loader: wanted batches, got an empty iterable"):
        baselines.ste(mlp, [], 0.5)

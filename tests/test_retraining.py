"""The retraining loop: masks held, schedule, options, errors."""

import copy
import math
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sfpk_kernels import GradualPruner, MaskSet, RetrainConfig, prune, retrain
from sfpk_kernels.baselines import magnitude

from .settings import population


@pytest.fixture
def loader(vectors):
    x, y = torch.cat([x for x, _ in vectors]), torch.cat([y for _, y in vectors])
    return DataLoader(TensorDataset(x, y), 16, shuffle=True)


def test_it_trains_under_masks(convnet, images):
    mask = magnitude(convnet, 0.7)
    convnet[1].eval()
    convnet[4].train()
    modes = [module.training for module in convnet.modules()]
    identities = [id(parameter) for parameter in convnet.parameters()]
    statistics = convnet[1].running_mean.clone()
    losses = retrain(convnet, images, mask, RetrainConfig(epochs=3, lr=0.02))
    assert len(losses) == 30
    assert sum(losses[-10:]) < sum(losses[:10])
    assert MaskSet.from_model(convnet) == mask
    assert [module.training for module in convnet.modules()] == modes
    assert [id(parameter) for parameter in convnet.parameters()] == identities
    assert all(parameter.grad is None for parameter in convnet.parameters())
    assert not torch.equal(convnet[1].running_mean, statistics)


def test_it_is_sgd_with_a_cosine(mlp, vectors):
    """Written out by hand."""
    mask = magnitude(mlp, 0.5)
    other = mask.apply_(copy.deepcopy(mlp))
    config = RetrainConfig(epochs=1, lr=0.3, momentum=0.8, weight_decay=0.01)
    losses = retrain(mlp, vectors[:4], mask, config)
    optimizer = torch.optim.SGD(other.parameters(), 0.3, momentum=0.8, nesterov=True, weight_decay=0.01)
    for step, (x, y) in enumerate(vectors[:4]):
        optimizer.param_groups[0]["lr"] = 0.3 * (1 + math.cos(math.pi * step / 4)) / 2
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(other(x), y)
        assert losses[step] == pytest.approx(loss.item(), rel=1e-5)
        loss.backward()
        optimizer.step()
        mask.apply_(other)
    for ours, theirs in zip(mlp.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_options_act(mlp, vectors, loader):
    mask = magnitude(mlp, 0.5)

    def outcome(batches=vectors, loss_fn=None, steps=None, seed=0, **options):
        model = copy.deepcopy(mlp)
        losses = retrain(
            model, batches, mask, RetrainConfig(**{"epochs": 0.3, **options}), loss_fn=loss_fn, steps=steps, seed=seed
        )
        return losses, model[0].weight.detach()

    plain, weight = outcome()
    assert len(plain) == 3
    smoothed, _ = outcome(label_smoothing=0.2)
    x, y = vectors[0]
    masked = mask.apply_(copy.deepcopy(mlp))
    assert smoothed[0] == pytest.approx(nn.functional.cross_entropy(masked(x), y, label_smoothing=0.2).item())
    for options in ({"clip_norm": 0.01}, {"momentum": 0.0}, {"weight_decay": 0.5}, {"lr": 0.01}):
        assert not torch.equal(outcome(**options)[1], weight)
    assert torch.equal(outcome()[1], weight)
    own, _ = outcome(loss_fn=lambda model, batch: model(batch[0]).square().mean())
    assert own[0] == pytest.approx(masked(x).square().mean().item())
    assert len(outcome(steps=5)[0]) == 5
    assert outcome(steps=0)[0] == []
    assert outcome(batches=loader, seed=1)[0] == outcome(batches=loader, seed=1)[0]
    assert outcome(batches=loader, seed=1)[0] != outcome(batches=loader, seed=2)[0]


def test_clipping_counts_kept_weights_alone(mlp, vectors, monkeypatch):
    mask = magnitude(mlp, 0.9)
    real, seen = nn.utils.clip_grad_norm_, []

    def watched(parameters, limit):
        seen.append(all(bool((mlp.get_parameter(name).grad[~mask[name]] == 0).all()) for name in mask))
        return real(parameters, limit)

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", watched)
    retrain(mlp, vectors, mask, RetrainConfig(epochs=1, clip_norm=0.1))
    assert seen == [True] * 10


def test_frozen_weights_are_masked_and_stay(mlp, vectors):
    mask = magnitude(mlp, 0.5)
    mlp[0].weight.requires_grad_(False)
    expected = mask.apply_(copy.deepcopy(mlp))[0].weight
    retrain(mlp, vectors, mask, RetrainConfig(epochs=1))
    assert torch.equal(mlp[0].weight, expected)
    assert MaskSet.from_model(mlp) == mask


def test_errors(mlp, vectors):
    mask = magnitude(mlp, 0.5)
    config = RetrainConfig(epochs=1)
    batches = [*vectors[:2], (vectors[2][0] * float("nan"), vectors[2][1])]
    with pytest.raises(FloatingPointError, match="wanted a finite loss, got nan in step 3 of 3 of retraining"):
        retrain(mlp, batches, mask, config)
    assert all(parameter.isfinite().all() and parameter.grad is None for parameter in mlp.parameters())
    with pytest.raises(TypeError, match="loader: wanted one with a length, to count epochs, got list_iterator"):
        retrain(mlp, iter(vectors), mask, config)
    with pytest.raises(ValueError, match="label_smoothing: wanted 0 beside a loss_fn of your own"):
        retrain(mlp, vectors, mask, RetrainConfig(epochs=1, label_smoothing=0.1), loss_fn=lambda model, batch: 0)
    with pytest.raises(TypeError, match=r"label_smoothing: wanted batches \(x, y\)"):
        retrain(mlp, [{"x": 1}], mask, RetrainConfig(epochs=1, label_smoothing=0.1))
    with pytest.raises(ValueError, match="wanted the model these masks were made for"):
        retrain(nn.Linear(2, 2), vectors, mask, config)
    with pytest.raises(ValueError, match="wanted parameters that require gradients"):
        retrain(mlp.requires_grad_(False), vectors, mask, config)


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        ({"epochs": 0}, ValueError, "epochs: wanted a number > 0, got 0"),
        ({"epochs": "1"}, TypeError, "epochs: wanted a number > 0, got '1'"),
        ({"epochs": float("inf")}, ValueError, "epochs: wanted"),
        ({"epochs": 1, "lr": -1}, ValueError, "lr: wanted a number > 0"),
        ({"epochs": 1, "momentum": 1}, ValueError, r"momentum: wanted a number in \[0, 1\)"),
        ({"epochs": 1, "weight_decay": True}, TypeError, "weight_decay: wanted a number ≥ 0"),
        ({"epochs": 1, "label_smoothing": 1.0}, ValueError, "label_smoothing: wanted"),
        ({"epochs": 1, "clip_norm": 0}, ValueError, "clip_norm: wanted a number > 0 or None"),
    ],
)
def test_bad_configs(values, error, words):
    with pytest.raises(error, match=words):
        RetrainConfig(**values)


def test_what_a_failed_step_leaves(convnet, images, monkeypatch):
    """Statistics of batch-norm as the step found them; after a stopped optimizer step the masks hold all the same."""
    mask = magnitude(convnet, 0.5)
    twin, bad = copy.deepcopy(convnet), [*images[:2], (images[2][0] * float("nan"), images[2][1])]
    retrain(twin, images[:2], mask, RetrainConfig(1, lr=1e-9))
    with pytest.raises(FloatingPointError):
        retrain(convnet, bad, mask, RetrainConfig(1, lr=1e-9))
    for name, buffer in convnet.named_buffers():
        assert torch.equal(buffer, twin.get_buffer(name)), name
    step, left = torch.optim.SGD.step, iter([False, True])

    def stopped(self, *arguments):
        step(self, *arguments)
        if next(left):
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data += 1.0
            raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.SGD, "step", torch.optim.Optimizer.profile_hook_step(stopped))
    with pytest.raises(KeyboardInterrupt) as caught:
        retrain(convnet, images, mask, RetrainConfig(1))
    if sys.version_info >= (3, 11):
        assert "in step 2 of 10 of retraining; the model keeps" in caught.value.__notes__[-1]
    assert MaskSet.from_model(convnet) == mask


class Endless(torch.utils.data.IterableDataset):
    """Samples of a list of batches; a pass may begin anew, or not."""

    def __init__(self, batches, again=True):
        self.samples = [pair for x, y in batches for pair in zip(x, y, strict=True)]
        self.left = None if again else iter(self.samples)

    def __iter__(self):
        return iter(self.samples) if self.left is None else self.left


def test_loaders_without_a_length(mlp, vectors):
    """Everything that reads batches: it works, or says what is wanted instead, before anything is trained."""
    streams = DataLoader(Endless(vectors), 16)
    config = population(0.5, n_particles=2, n_steps=6)
    listed = prune(mlp, vectors, config=config)
    assert prune(mlp, streams, config=config).mask == listed.mask
    assert prune(mlp, DataLoader(Endless(vectors), 16, num_workers=1), config=config).mask == listed.mask
    assert prune(mlp, (batch for batch in vectors * 2), config=config).mask == listed.mask
    before = copy.deepcopy(mlp.state_dict())
    for loader, what in (
        (streams, "DataLoader over a Endless"), (iter(vectors), "list_iterator"), ((b for b in vectors), "generator"),
        (Endless(vectors), "Endless"),
    ):  # fmt: skip
        for search in (vectors, loader):
            with pytest.raises(TypeError, match=f"^loader: wanted one with a length, .* got {what}: .*retrain_loader="):
                GradualPruner(mlp, search, config=config, shots=2, retrain=1, retrain_loader=loader)
    with pytest.raises(ValueError, match="^loader: wanted batches, got a loader of length 0"):
        GradualPruner(mlp, vectors, config=config, shots=2, retrain=1, retrain_loader=[])
    assert all(torch.equal(value, before[name]) for name, value in mlp.state_dict().items())
    twin = copy.deepcopy(mlp)
    found = GradualPruner(mlp, streams, config=config, shots=2, retrain=1, retrain_loader=vectors).run()
    assert found.masks == GradualPruner(twin, vectors, config=config, shots=2, retrain=1).run().masks
    assert len(retrain(mlp, streams, found.mask, RetrainConfig(1), steps=13)) == 13
    with pytest.raises(
        ValueError, match=r"^loader: wanted 99 batches \(steps of retraining\), got a one-shot iterator"
    ):
        retrain(mlp, iter(vectors), found.mask, RetrainConfig(1), steps=99)
    read = DataLoader(Endless(vectors, again=False), 16)
    with pytest.raises(ValueError, match="yields nothing: its IterableDataset should open its source in __iter__"):
        prune(mlp, read, config=config)
    with pytest.raises(ValueError, match="got an empty iterable: its IterableDataset should open"):
        prune(mlp, read, config=config)
    spent = iter(vectors[:0])
    with pytest.raises(ValueError, match="got a one-shot iterator that is empty, or was read to its end before"):
        prune(mlp, spent, config=config)

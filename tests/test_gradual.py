"""Gradual pruning and the retraining loop: schedules, budgets, what returns, resume, errors, and whether it pays."""

import copy
import math
import statistics
from itertools import pairwise

import pytest
import torch
from torch import nn

from sfpk_kernels import GradualPruner, RetrainConfig, SFPKConfig, prune, retrain
from sfpk_kernels.gradual import plan_shots

from .snapshot import Snapshot


def quick(**overrides):
    options = {"n_particles": 2, "n_steps": 12, "energy_mode": "sequential", **overrides}
    return SFPKConfig(0.9, **options)


def gradual(model, batches, **options):
    options = {"shots": 3, "retrain": 2, "progress": False, **options}
    config = options.pop("config", quick())
    return GradualPruner(model, None, batches, config, **options)


def test_densities_steps_and_budget():
    plan = plan_shots(quick(n_steps=10), 4)
    assert [shot.density for shot in plan] == pytest.approx([0.1 ** (i / 4) for i in (1, 2, 3, 4)])
    assert [shot.start_density for shot in plan] == pytest.approx([0.1 ** (i / 4) for i in range(4)])
    assert plan[-1].density == 1 - 0.9
    assert sum(shot.n_steps for shot in plan) == 10
    assert sum(shot.share for shot in plan) == pytest.approx(1)
    ratios = [b.share / a.share for a, b in pairwise(plan)]
    assert ratios == pytest.approx([0.1 ** (-1 / 4)] * 3)
    assert [shot.share for shot in plan_shots(quick(), 4, growth=1)] == pytest.approx([0.25] * 4)


def test_each_shot_is_exact_and_goes_on_from_the_particles(mlp, vectors):
    identities = [id(p) for p in mlp.parameters()]
    pruner = gradual(mlp, vectors)
    result = pruner.run()
    assert [id(p) for p in mlp.parameters()] == identities
    assert [mask.kept for mask in result.masks] == [round(0.1 ** (i / 3) * 144) for i in (1, 2, 3)]
    assert result.mask == result.masks[-1]
    for name in result.mask:
        weight = mlp.get_parameter(name)
        assert (weight[~result.mask[name]] == 0).all()
    for before, record in pairwise(result.history):
        assert record.search[0].start_density == pytest.approx(before.shot.density, rel=1e-4)
    assert [len(record.losses) for record in result.history] == [
        round(20 * sum(s.share for s in pruner.plan[: i + 1])) - round(20 * sum(s.share for s in pruner.plan[:i]))
        for i in range(3)
    ]
    assert sum(len(record.losses) for record in result.history) == 2 * len(vectors)
    assert result.particles.shape == (2, 144)


def test_a_returning_weight_brings_its_value(mlp, vectors):
    """A function that retrains nothing: all kept weights have their dense values, whatever was removed before."""
    dense = copy.deepcopy(mlp)
    seen = []
    pruner = gradual(mlp, vectors, retrain=lambda model, masks, shot: seen.append(shot.number))
    while not pruner.done:
        record = pruner.shot()
        mask = pruner.result().mask
        for name in mask:
            assert torch.equal(mlp.get_parameter(name), dense.get_parameter(name) * mask[name])
        if record.shot.number > 1:
            previous = pruner.result().masks[-2]
            assert record.returned == int((mask.flat() & ~previous.flat()).sum())
    assert seen == [1, 2, 3]


def test_resumed_between_shots_is_the_uninterrupted_run(mlp, vectors, tmp_path):
    other = copy.deepcopy(mlp)
    whole = gradual(mlp, vectors).run()
    path = tmp_path / "gradual"
    first = copy.deepcopy(other)
    pruner = gradual(first, vectors)
    pruner.shot()
    calls = []

    def stop(*args, **kwargs):
        calls.append(1)
        raise KeyboardInterrupt

    saved = gradual(copy.deepcopy(other), vectors)
    saved._search, search = None, saved._search
    saved._search = lambda shot, seed: search(shot, seed) if shot.number < 3 else stop()
    with pytest.raises(KeyboardInterrupt):
        saved.run(save=path)
    fresh = copy.deepcopy(other)
    again = gradual(fresh, vectors).run(resume=path, save=path)
    assert again.mask == whole.mask
    assert again.masks == whole.masks
    assert torch.equal(again.particles, whole.particles)
    for a, b in zip(fresh.parameters(), mlp.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [record.losses for record in again.history] == [record.losses for record in whole.history]
    with pytest.raises(ValueError, match="wanted one of a run with the same settings"):
        gradual(copy.deepcopy(other), vectors, shots=4).run(resume=path)
    path.write_bytes(path.read_bytes()[:-10])
    untouched = copy.deepcopy(other)
    snapshot = Snapshot(untouched)
    with pytest.raises(ValueError, match="cut or altered"):
        gradual(untouched, vectors).run(resume=path)
    snapshot.check()


@pytest.mark.parametrize("where", ["search", "retraining"])
def test_after_an_error_the_model_is_as_after_the_last_shot(mlp, vectors, where):
    def fail(model, masks, shot):
        nn.init.normal_(model[0].weight)
        if shot.number == 2:
            raise KeyboardInterrupt

    pruner = gradual(mlp, vectors, retrain=fail)
    pruner.shot()
    snapshot = Snapshot(mlp)
    if where == "search":
        pruner._loader = []
    with pytest.raises((KeyboardInterrupt, ValueError)):
        pruner.shot()
    snapshot.check()
    assert pruner.finished == 1


def test_bad_arguments(mlp, vectors):
    for options, error, words in [
        ({"shots": 0}, ValueError, "shots: wanted 1 … 12"),
        ({"shots": 2.0}, TypeError, "shots: wanted an integer"),
        ({"growth": 0.5}, ValueError, "growth"),
        ({"retrain": "much"}, TypeError, "retrain: wanted epochs"),
        ({"retrain": 0}, ValueError, "epochs"),
        ({"retrain_loader": iter(vectors)}, TypeError, "wanted one with a length"),
        ({"config": 3}, TypeError, "config: wanted an SFPKConfig"),
    ]:
        with pytest.raises(error, match=words):
            gradual(mlp, vectors, **options)


def test_retrain_keeps_zeros_and_lowers_the_loss(mlp, vectors):
    mask = prune(mlp, None, vectors, quick()).mask
    buffers = [id(p) for p in mlp.parameters()]
    mlp.eval()
    losses = retrain(mlp, None, vectors, mask, RetrainConfig(epochs=20, lr=0.1), progress=False)
    assert len(losses) == 200
    assert statistics.mean(losses[-10:]) < statistics.mean(losses[:10])
    for name in mask:
        assert (mlp.get_parameter(name)[~mask[name]] == 0).all()
        assert (mlp.get_parameter(name)[mask[name]] != 0).all()
    assert [id(p) for p in mlp.parameters()] == buffers
    assert not mlp.training
    assert all(p.grad is None for p in mlp.parameters())


def test_retrain_options(mlp, vectors):
    mask = prune(mlp, None, vectors, quick()).mask
    again = [copy.deepcopy(mlp) for _ in range(4)]
    base = RetrainConfig(epochs=1, lr=0.1)
    runs = [
        retrain(again[0], None, vectors, mask, base, progress=False),
        retrain(again[1], None, vectors, mask, base, progress=False),
        retrain(again[2], None, vectors, mask, RetrainConfig(epochs=1, lr=0.1, label_smoothing=0.2), progress=False),
        retrain(again[3], None, vectors, mask, RetrainConfig(epochs=1, lr=0.1, clip_norm=1e-3), progress=False),
    ]
    assert runs[0] == runs[1]
    x, y = vectors[0]
    masked = mask.apply_(copy.deepcopy(mlp))
    smooth = nn.functional.cross_entropy(masked(x), y, label_smoothing=0.2)
    assert runs[2][0] == pytest.approx(float(smooth.detach()), rel=1e-5)
    moved = sum(float((a - b).detach().norm()) for a, b in zip(again[3].parameters(), masked.parameters(), strict=True))
    assert moved < 0.1 * sum(
        float((a - b).detach().norm()) for a, b in zip(again[0].parameters(), masked.parameters(), strict=True)
    )
    with pytest.raises(ValueError, match="label_smoothing"):
        retrain(mlp, lambda m, b: m(b[0]).sum(), vectors, mask, RetrainConfig(epochs=1, label_smoothing=0.1))
    with pytest.raises(FloatingPointError, match="in step 1 of 10 of retraining"):
        retrain(mlp, lambda m, b: m(b[0]).sum() * math.nan, vectors, mask, base, progress=False)

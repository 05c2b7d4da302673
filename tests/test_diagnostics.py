"""What each step says about the particles, alarms, and particles without a finite gradient."""

import dataclasses
import logging

import pytest
import torch
from torch import nn

from sfpk_kernels import Execution, SFPKConfig, SFPKPruner, prune
from sfpk_kernels.search import diagnostics as module
from sfpk_kernels.search.diagnostics import Alarms
from sfpk_kernels.search.nonfinite import standing_still
from sfpk_kernels.search.records import StepRecord

from .settings import population


def quick(**overrides):
    options = {"n_particles": 4, "n_steps": 10, **overrides}
    return population(0.8, **options)


def measured_by_hand(pruner):
    """Binary masks as the energies see them, from the definition."""
    keep = pruner._run.polarizer.polarize(pruner.particles, pruner._run.system.densities, pruner.config.polarizer)
    return keep.weights(torch.ones(pruner.coordinates.d)) != 0


@pytest.mark.parametrize("polarizer", ["mask", "mask_normalized"])
@pytest.mark.parametrize("kernel", ["rbf", "weighted_rbf"])
def test_against_the_definitions(mlp, vectors, polarizer, kernel):
    pruner = SFPKPruner(mlp, config=quick(polarizer=polarizer, kernel=kernel, consensus=0.0))
    for k in range(4):
        kept = measured_by_hand(pruner)
        record = pruner.step(vectors[k : k + 4])
    inter = (kept.double() @ kept.double().T).numpy()
    for i in range(4):
        for j in range(4):
            union = inter[i, i] + inter[j, j] - inter[i, j]
            assert record.overlaps[i][j] == pytest.approx(inter[i, j] / union)
    assert record.layer_densities == pytest.approx(
        [float(kept[:, :96].double().mean()), float(kept[:, 96:].double().mean())]
    )
    particles = pruner.particles.double()
    spread = (particles - particles.mean(dim=0)).square().sum(dim=1).mean().sqrt()
    assert record.deviation == pytest.approx(float(spread / particles.square().sum(dim=1).mean().sqrt()), rel=1e-4)
    n = 16 / sum(v * v for row in record.overlaps for v in row)
    assert record.effective_particles == pytest.approx(n)
    assert 1 <= n <= 4
    assert record.mean_overlap == pytest.approx((sum(map(sum, record.overlaps)) - 4) / 12)
    assert record.energy_min == min(record.energies)
    assert record.energy_std == pytest.approx(float(torch.tensor(record.energies).double().std(correction=0)))


@pytest.mark.parametrize("fields", [{}, {"signed_score": True}, {"pattern": (2, 4)}])
@pytest.mark.parametrize("polarizer", ["mask", "mask_normalized"])
def test_what_is_kept_below_zero(mlp, fields, polarizer):
    """By the same score as the binary particles: with its sign, or without."""
    pruner = SFPKPruner(mlp, config=population(0.5, polarizer=polarizer, n_particles=2, **fields))
    particles, densities = torch.randn(2, 144), torch.full((2,), 0.6, dtype=torch.float64)
    keep = pruner._run.polarizer.polarize(particles, densities, polarizer)
    kept = keep.weights(torch.ones(144)) != 0
    seen = pruner._run.diagnostics.observe(keep)
    assert seen.layer_densities.tolist() == pytest.approx(
        [float(kept[:, :96].double().mean()), float(kept[:, 96:].double().mean())]
    )
    assert float(seen.overlaps[0, 1]) == pytest.approx(float((kept[0] & kept[1]).sum() / (kept[0] | kept[1]).sum()))


def test_a_sample_of_many_coordinates_is_close(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 600), nn.Tanh(), nn.Linear(600, 5), nn.Tanh(), nn.Linear(5, 4))
    batches = [(torch.randn(8, 64), torch.randint(4, (8,))) for _ in range(4)]
    exact = prune(model, batches, config=quick(n_steps=4)).history[-1]
    monkeypatch.setattr(module, "_SAMPLE", 4096)
    sampled = prune(model, batches, config=quick(n_steps=4)).history[-1]
    assert sampled.energies == exact.energies
    for a, b in zip(sampled.overlaps, exact.overlaps, strict=True):
        assert a == pytest.approx(b, abs=0.05)
    assert sampled.layer_densities[:2] == pytest.approx(exact.layer_densities[:2], abs=0.08)
    assert sampled.layer_densities[2] == exact.layer_densities[2], "20 weights: counted whole"


def test_identical_particles_count_as_one(mlp, vectors):
    record = SFPKPruner(mlp, config=quick()).step(vectors[:4])
    assert record.effective_particles == pytest.approx(1.0)
    assert record.mean_overlap == 1.0
    assert record.start_density == 1.0


def step(number, energies, **options):
    return StepRecord(number, 0.5, [0.5] * len(energies), energies, [0.1] * len(energies), 0.1, **options)


def test_alarms_are_given_once():
    alarms = Alarms(quick(), ["first", "second"])
    fine = step(1, [1.0, 1.1, 0.9, 1.0], deviation=0.1, layer_densities=[0.5, 0.5])
    assert alarms.check([], fine) == []
    bad = step(2, [1.0] * 4, deviation=1e-9, layer_densities=[0.5, 0.0001])
    words = alarms.check([fine], bad)
    assert len(words) == 2
    assert "the particles have collapsed" in words[0]
    assert "second is about to die: 0.01 % of its weights" in words[1]
    assert alarms.check([fine, bad], bad) == []


def test_a_falling_loss_is_an_alarm_and_chance_is_none():
    def run(values, spread):
        alarms, history = Alarms(quick(), []), []
        for k, value in enumerate(values):
            record = step(k + 1, [value - spread, value + spread, value - spread, value + spread], deviation=0.1)
            for words in alarms.check(history, record):
                return words
            history.append(record)
        return None

    assert "the loss falls (2.3 at the start" in run([2.3, 2.0, 1.5, 1.2, 1.0, 0.8], 0.05)
    assert run([2.3, 2.0, 1.5, 1.2, 1.0, 0.8], 1.0) is None, "within what batches differ by"
    assert run([0.5, 0.5, 0.6, 0.7, 0.9, 1.2], 0.01) is None


def test_after_a_merge_more_steps_are_averaged_before_it_is_said_that_the_loss_falls():
    alarms, history = Alarms(quick(merge=0.1), []), []
    for k, energies in enumerate([[2.2, 2.3, 2.3, 2.4], *([1.0] for _ in range(5))]):
        record = dataclasses.replace(step(k + 1, energies, deviation=0.1), deviation=0.1 if k == 0 else 0.0)
        found = alarms.check(history, record)
        assert [words[:14] for words in found] == (["the loss falls"] if k == 5 else [])
        history.append(record)


@pytest.mark.parametrize("n", [1, 4])
def test_an_untrained_model_is_noticed(n, caplog):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 4))
    with torch.no_grad():
        model[2].weight.mul_(20)  # confident, and wrong
    x = torch.randn(256, 8)
    batches = [(x, torch.randint(4, (256,)))] * 4
    with caplog.at_level(logging.WARNING, logger="sfpk_kernels"):
        result = prune(model, batches, config=quick(n_steps=20, n_particles=n))
    assert any("the loss falls" in words for words in result.alarms)
    assert "is the model trained" in caplog.text


def test_one_particle_whose_batches_differ_is_no_alarm():
    alarms, history = Alarms(population(0.8, n_particles=1, n_steps=40), ["0.weight"]), []
    for k in range(40):
        energy = 0.5 + (0.3, -0.2, 0.1, -0.3, 0.2)[k % 5] - 0.002 * k
        record = StepRecord(k + 1, 1 - k / 50, [1 - k / 50], [energy], [0.0], 0.1, deviation=1.0, layer_densities=[0.5])
        assert not alarms.check(history, record)
        history.append(record)


ONE_BY_ONE = Execution(energy_mode="sequential")  # for losses that know their batches by identity


def spoiled(vectors, what):
    """Batch 5: the loss NaN, or finite with a gradient that is not."""

    def loss_fn(model, batch):
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        if batch[0] is bad:
            loss = loss * float("nan") if what == "loss" else loss + (loss - loss.detach()).abs().sqrt()
        return loss

    bad = vectors[5][0]
    return loss_fn


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("update", ["jacobi", "gauss_seidel"])
def test_a_particle_without_finite_gradient_is_skipped_and_named(mlp, vectors, what, update, caplog):
    config = quick(nonfinite="skip_particle", update=update)
    pruner = SFPKPruner(mlp, loss_fn=spoiled(vectors, what), config=config, execution=ONE_BY_ONE)
    pruner.step(vectors[:4])
    before = pruner.particles.clone()
    with caplog.at_level(logging.WARNING, logger="sfpk_kernels"):
        record = pruner.step(vectors[4:8])
    assert record.skipped == [1]
    assert "particle 1 had no finite loss and gradient" in caplog.text
    assert torch.equal(pruner.particles[1], before[1])
    assert not torch.equal(pruner.particles[0], before[0])
    assert torch.isfinite(pruner.particles).all()
    assert record.energy == record.energy
    strict = SFPKPruner(mlp, loss_fn=spoiled(vectors, what), config=quick(update=update), execution=ONE_BY_ONE)
    strict.step(vectors[:4])
    with pytest.raises(FloatingPointError, match=f"(?i)finite {what}, got nan.* in step 2, particle 1"):
        strict.step(vectors[4:8])


def test_a_skipped_particle_does_not_spoil_the_run(mlp, vectors):
    result = prune(
        mlp, vectors, loss_fn=spoiled(vectors, "loss"), config=quick(nonfinite="skip_particle"), execution=ONE_BY_ONE
    )
    assert result.mask.kept == round(0.2 * 144)
    assert any("stood still" in words for words in result.alarms)


def test_all_particles_without_finite_gradient_raise(mlp, vectors):
    def loss_fn(model, batch):
        return model(batch[0]).sum() * float("nan")

    with pytest.raises(FloatingPointError, match="particle 0"):
        prune(mlp, vectors, loss_fn=loss_fn, config=quick(nonfinite="skip_particle"))


def test_layers_that_only_the_final_mask_loses(vectors, caplog):
    """Without retraction the particles' own masks stay denser than the mask that is returned."""
    model = nn.Sequential(nn.Linear(8, 200), nn.Tanh(), nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 4))
    with torch.no_grad():
        model[2].weight.mul_(0.2)
    config = SFPKConfig.preset("paper", sparsity=0.99, n_particles=2, n_steps=6, final_score="mask_weight")
    with caplog.at_level(logging.WARNING, "sfpk_kernels"):
        result = prune(model, vectors, config=config, waypoints=[0.5])
    densities = result.mask.layer_densities()
    assert densities["2.weight"] < 0.001 < min(densities["0.weight"], densities["4.weight"])
    assert all(record.layer_densities[1] >= 0.001 for record in result.history)
    (words,) = result.dead_layers
    assert words.startswith("mask at 0.99: 2.weight is ")
    assert words in result.alarms
    assert words in result.summary()["alarms"]
    assert words in caplog.text


def test_dense_zeros_of_norms_are_no_dead_layers(vectors):
    model = nn.Sequential(nn.Linear(8, 12), nn.LayerNorm(12), nn.Tanh(), nn.Linear(12, 4))
    config = quick(polarizer="mask_weight", n_steps=4)
    result = prune(model, vectors, config=config, include_norms=True)
    assert result.mask.layer_densities()["1.bias"] == 0
    assert not result.alarms


@pytest.mark.parametrize("update", ["jacobi", "gauss_seidel"])
def test_a_step_without_any_finite_particle_is_an_error(mlp, vectors, update):
    batches = [(x, y) for x, y in vectors[:4]] + [(x * float("nan"), y) for x, y in vectors[4:8]]
    config = quick(nonfinite="skip_particle", update=update)
    with pytest.raises(FloatingPointError, match="wanted a finite loss, got nan in step 2, particle"):
        prune(mlp, batches, config=config)


def test_what_is_not_finite_is_named():
    nan = float("nan")
    assert standing_still([0.5, 1.0], [0.1, -0.2], 3, skips=False) == []
    assert standing_still([0.5, nan, 1.0], [nan, nan, 0.2], 3, skips=True) == [0, 1]
    with pytest.raises(FloatingPointError, match="a finite gradient, got NaN, infinity .* in step 3, particle 0"):
        standing_still([0.5, nan], [nan, nan], 3, skips=True)
    with pytest.raises(FloatingPointError, match="wanted a finite loss, got nan in step 3, particle 1") as caught:
        standing_still([0.5, nan, 1.0], [0.1, nan, nan], 3, skips=False)
    assert caught.value.moved == 1, "one after the other, those before it have moved"

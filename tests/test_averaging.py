"""Gradients averaged over the last steps: the plain recurrence, what is kept of it, and when."""

import json
import math

import pytest
import torch

from sfpk_kernels import Execution, SFPKConfig, SFPKPruner
from sfpk_kernels import plan as plan_of
from sfpk_kernels.search import checkpoint
from sfpk_kernels.search.averaging import Gradients, keep_, most, shortening, staying
from sfpk_kernels.search.particles import ParticleSystem
from sfpk_kernels.search.records import StepRecord
from sfpk_kernels.search.schedule import density_schedule
from sfpk_kernels.search.step_length import StepLength

from .settings import both
from .test_merge import advance, batches_of
from .test_step_length import plain_run, setting

D, K = 50, 10


def quick(**options):
    return SFPKConfig(**{"sparsity": 0.8, "n_particles": 3, "n_steps": K, "averaging": 0.5, **options})


def system_of(config):
    theta = torch.randn(D, generator=torch.Generator().manual_seed(5))
    return ParticleSystem(D, config, Execution(), theta, None)


@pytest.mark.parametrize(
    ("steps", "averaging", "beta"),
    [(1000, 0.03, 29 / 30), (300, 0.03, 8 / 9), (60, 0.03, 4 / 9), (33, 0.03, 0.0), (9, 0.0, 0.0)],
)
def test_the_longest_horizon_grows_with_the_run(steps, averaging, beta):
    config = quick(n_steps=steps, averaging=averaging)
    assert most(config) == pytest.approx(beta)
    assert SFPKConfig(0.8).averaging == 0.03


def of(*agreements):
    return [StepRecord(1, 0.5, [0.5], [1.0], [0.1], 0.1, agreements=list(each)) for each in agreements]


@pytest.mark.parametrize(
    ("agreements", "beta"),
    [
        ([], 0.0),
        ([[]], 0.0),  # steps of a run that averaged nothing
        ([[math.nan, math.nan]], 0.0),
        ([[-0.1, -0.3]], 0.4),
        ([[0.5, 0.3]], 0.0),  # gradients that agree
        ([[-0.2, -0.2], [-0.6, math.nan]], 0.8),  # of 40 steps the last six count, of a step all particles
        ([[0.9, 0.9], *[[-0.3, -0.3]] * 6], 0.6),
        ([[-0.9, -0.9]] * 3, 11 / 12),  # no more than the longest horizon, of 12 steps
    ],
)
def test_averages_stay_as_far_as_gradients_point_against_them(agreements, beta):
    assert staying(quick(n_steps=40, averaging=0.3), of(*agreements)) == pytest.approx(beta)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.8])
def test_moves_are_shortened_as_averages_are(beta):
    assert shortening(beta) == pytest.approx(((1 - beta) / (1 + beta)) ** 0.6)
    length = StepLength(quick(step_length="angle"), [])
    assert length.angle(3, 1.0, staying=beta) == pytest.approx(length.angle(3, 1.0) * shortening(beta))


def test_what_is_measured_of_one_particle_after_the_other():
    make = torch.Generator().manual_seed(0)
    grads, averages = (torch.randn(3, D, generator=make) for _ in range(2))
    together, one_by_one = (Gradients(averaged=True, measured=measured) for measured in (False, True))
    for gradients, size in ((together, 3), (one_by_one, 1)):
        system = system_of(quick())
        system._average.copy_(averages)
        for first in range(0, 3, size):
            row = None if size == 3 else first
            gradients.add(system.average_(grads[first : first + size].clone(), row=row, staying=0.5))
    assert torch.equal(together.agreements, one_by_one.agreements)
    assert torch.equal(together.shares, one_by_one.shares)
    assert list(together.asked_for) == ["agreements"]
    assert list(one_by_one.asked_for) == ["effective_dimensions", "agreements"]
    wanted = torch.cosine_similarity(grads.double() * system._theta, averages.double() * system._theta)
    torch.testing.assert_close(together.agreements, wanted)


def test_what_is_common_to_all_gradients_stays_and_noise_is_shortened_as_said():
    """The exponent lies above the half that gradients without anything in common would have."""
    noise = torch.randn(4000, 200, generator=torch.Generator().manual_seed(0))
    average, beta = torch.zeros(200), 0.8
    for row in noise:
        average.lerp_(row, 1 - beta)
    ratio = float(average.norm()) / math.sqrt(200)
    assert ratio == pytest.approx(math.sqrt((1 - beta) / (1 + beta)), rel=0.2)
    assert shortening(beta) < ratio


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("update", ["jacobi", "gauss_seidel"])
def test_particles_move_along_the_recurrence(update, dtype):
    """As by averages made outside."""
    averaged, plain = (system_of(quick(averaging=a, update=update, particle_dtype=dtype)) for a in (0.5, 0.0))
    mean, beta = torch.zeros(3, D), 0.8
    for seed in range(4):
        grads = torch.randn(3, D, generator=torch.Generator().manual_seed(seed))
        mean = torch.stack([g.lerp(m, beta) for g, m in zip(grads, mean, strict=True)])
        for row in [None] if update == "jacobi" else range(3):
            rows = slice(None) if row is None else slice(row, row + 1)
            mine = grads[rows].clone()
            averaged.average_(mine, row=row, staying=beta)
            stats = averaged.move_(mine, row=row, angle=0.2)
            other = plain.move_(mean[rows].clone(), row=row, angle=0.2)
            torch.testing.assert_close(stats.cosines, other.cosines)
        for system in (averaged, plain):
            system.end_step(stats.densities.tolist())
    torch.testing.assert_close(averaged.masks, plain.masks)
    torch.testing.assert_close(averaged.state_dict()["average"], mean)
    assert plain.state_dict()["average"] is None


def test_a_run_follows_the_plain_loop():
    """In which gradients point against their average now and then: some steps average, others do not."""
    model, data, config = setting(14, averaging=0.3)
    m, _ = plain_run(
        model, data, density_schedule("cubic", 0.4, 14), lambda m, saliency: m.abs() * saliency, most=most(config)
    )
    result = SFPKPruner(model, config=config).run(data)
    torch.testing.assert_close(result.particles[0].double(), m, rtol=1e-5, atol=1e-6)
    used = [staying(config, result.history[:k]) for k in range(14)]
    assert {beta > 0 for beta in used} == {True, False}
    assert math.isnan(result.history[0].agreements[0])
    assert all(math.isfinite(record.agreements[0]) for record in result.history[1:])


@pytest.mark.parametrize("update", ["jacobi", "gauss_seidel"])
def test_a_gradient_that_is_not_finite_does_not_enter(mlp, vectors, update):
    """After the error the run goes on as if that step had never been tried."""
    bad = (torch.full_like(vectors[0][0], float("nan")), vectors[0][1])
    pruner, other = (SFPKPruner(mlp, config=quick(update=update)) for _ in range(2))
    for each in (pruner, other):
        advance(each, vectors, 3)
    with pytest.raises(FloatingPointError):
        pruner.step([bad, *batches_of(pruner, vectors, 3)[1:]])
    for each in (pruner, other):
        advance(each, vectors, 6)
    assert torch.equal(pruner.particles, other.particles)


def test_a_particle_that_stands_still_keeps_its_average():
    config = quick(nonfinite="skip_particle")
    system = system_of(config)
    grads = torch.randn(3, D, generator=torch.Generator().manual_seed(1))
    system.end_step(system.move_(grads.clone(), angle=0.1).densities.tolist())
    before = system.state_dict()["average"]
    grads = grads.flip(1)
    grads[1, 7] = float("inf")
    system.average_(grads, staying=0.5)
    system.move_(grads, angle=0.1)
    after = system.state_dict()["average"]
    assert torch.equal(after[1], before[1])
    assert not torch.equal(after[0], before[0])
    assert bool(after.isfinite().all())


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("bad", [[], [1], [0, 1, 2]])
def test_averages_that_are_kept(bad, alone):
    """On the CPU by a look at them, elsewhere by an operator that does not wait: here on a device without values."""
    average, grads, cosines = torch.zeros(3, D), torch.ones(3, D), torch.rand(3).double()
    cosines[bad] = math.nan
    keep_(average, grads, cosines, alone)
    stays = [i in bad if alone else bool(bad) for i in range(3)]
    assert average.sum(1).tolist() == [0 if stay else D for stay in stays]
    elsewhere = [t.to("meta") for t in (average, grads, cosines)]
    keep_(*elsewhere, alone)


def test_averages_merge_as_particles_do(mlp, vectors):
    pruner = SFPKPruner(mlp, config=quick(merge=0.3))
    advance(pruner, vectors, 2)
    system = pruner._run.system
    seen = []
    merge, grown = system.merge_, []

    def watched():
        seen.append(system.state_dict()["average"])
        merge()
        grown.append(system.state_dict()["average"])

    system.merge_ = watched
    advance(pruner, vectors, 4)
    torch.testing.assert_close(grown[0], seen[0].mean(dim=0, keepdim=True))
    assert len(system.state_dict()["average"]) == 1


def test_the_plan_counts_it(mlp, vectors):
    with_it, without = (plan_of(mlp, vectors, config=quick(averaging=a)) for a in (0.5, 0.05))
    d = with_it.coordinates
    assert with_it.parts["averages of gradients"] == 3 * d * 4
    assert without.parts["averages of gradients"] == 0
    assert with_it.alternatives["averaging=0"] < with_it.peak_bytes
    assert "averaging=0" not in " ".join(without.alternatives)
    assert "averages of gradients" in str(with_it)
    assert "averages of gradients" not in str(without)


def test_states_from_before_there_were_averages(mlp, vectors):
    pruner, other = (SFPKPruner(mlp, **both(quick, averaging=0.0)) for _ in range(2))
    advance(pruner, vectors, 3)
    state = pruner.state_dict()
    old = json.loads(state["config"])
    del old["averaging"], state["particles"]["average"]
    state["config"] = json.dumps(old)
    assert checkpoint.of_this_version(state)["particles"]["average"] is None
    other.load_state_dict(state)
    for each in (pruner, other):
        advance(each, vectors, K)
    assert torch.equal(pruner.particles, other.particles)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda average: None, "average: wanted a tensor"),
        (lambda average: average[:1], "average: wanted"),
        (lambda average: average.double(), "average: wanted"),
        (lambda average: average.fill_(float("nan")), "average: wanted"),
    ],
    ids=["none", "shape", "dtype", "nan"],
)
def test_altered_averages_are_refused(mlp, vectors, change, message):
    pruner = SFPKPruner(mlp, config=quick())
    advance(pruner, vectors, 2)
    state = pruner.state_dict()
    state["particles"]["average"] = change(state["particles"]["average"].clone())
    with pytest.raises((TypeError, ValueError), match=message):
        SFPKPruner(mlp, config=quick()).load_state_dict(state)


def test_averages_where_there_should_be_none(mlp, vectors):
    pruner = SFPKPruner(mlp, config=quick(averaging=0.0))
    advance(pruner, vectors, 2)
    state = pruner.state_dict()
    state["particles"]["average"] = torch.zeros_like(state["particles"]["masks"])
    with pytest.raises(ValueError, match="average: wanted None where nothing is averaged"):
        pruner.load_state_dict(state)


@pytest.mark.parametrize(
    ("agreements", "words"),
    [([0.1, 0.2], "wanted 3"), ([0.1, 0.2, 1.5], r"wanted cosines in \[-1, 1\]"), ([0.1, 0.2, "a"], "wanted a number")],
)
def test_damaged_agreements_are_named(mlp, vectors, agreements, words):
    pruner = SFPKPruner(mlp, config=quick())
    advance(pruner, vectors, 2)
    state = pruner.state_dict()
    state["history"][1]["agreements"] = agreements
    with pytest.raises((TypeError, ValueError), match=rf"history\[1\].agreements.*{words}"):
        SFPKPruner(mlp, config=quick()).load_state_dict(state)

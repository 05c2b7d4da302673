"""Gradients averaged over the last steps: the plain recurrence, what is kept of it, and when."""

import json
import math

import pytest
import torch

from sfpk_kernels import Execution, SFPKConfig, SFPKPruner
from sfpk_kernels import plan as plan_of
from sfpk_kernels.search import checkpoint
from sfpk_kernels.search.averaging import decay, shortening
from sfpk_kernels.search.particles import ParticleSystem
from sfpk_kernels.search.schedule import density_schedule
from sfpk_kernels.search.step_length import StepLength

from .settings import both
from .test_merge import advance, batches_of
from .test_step_length import by_angle, plain_run, setting

D, K = 50, 10


def quick(**options):
    return SFPKConfig(**{"sparsity": 0.8, "n_particles": 3, "n_steps": K, "averaging": 0.5, **options})


def system_of(config):
    theta = torch.randn(D, generator=torch.Generator().manual_seed(5))
    return ParticleSystem(D, config, Execution(), theta, None)


@pytest.mark.parametrize(
    ("steps", "averaging", "beta"),
    [(1000, 0.005, 0.8), (5000, 0.005, 0.96), (300, 0.005, 1 / 3), (200, 0.005, 0.0), (60, 0.005, 0.0), (9, 0.0, 0.0)],
)
def test_the_horizon_grows_with_the_run(steps, averaging, beta):
    config = quick(n_steps=steps, averaging=averaging)
    assert decay(config) == pytest.approx(beta)
    assert shortening(config) == pytest.approx(((1 - beta) / (1 + beta)) ** 0.6)
    length, plain = (StepLength(config.replace(step_length="angle", averaging=a), []) for a in (averaging, 0.0))
    assert length.angle(3, 1.0) == pytest.approx(plain.angle(3, 1.0) * shortening(config))


def test_what_is_common_to_all_gradients_stays_and_noise_is_shortened_as_said():
    """The exponent lies above the half that gradients without anything in common would have."""
    noise = torch.randn(4000, 200, generator=torch.Generator().manual_seed(0))
    average, beta = torch.zeros(200), 0.8
    for row in noise:
        average.lerp_(row, 1 - beta)
    ratio = float(average.norm()) / math.sqrt(200)
    assert ratio == pytest.approx(math.sqrt((1 - beta) / (1 + beta)), rel=0.2)
    assert shortening(quick(n_steps=1000, averaging=0.005)) < ratio


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("update", ["jacobi", "gauss_seidel"])
def test_particles_move_along_the_recurrence(update, dtype):
    """Bit for bit as by averages made outside."""
    averaged, plain = (system_of(quick(averaging=a, update=update, particle_dtype=dtype)) for a in (0.5, 0.0))
    mean, beta = torch.zeros(3, D), decay(quick())
    for seed in range(4):
        grads = torch.randn(3, D, generator=torch.Generator().manual_seed(seed))
        mean = torch.stack([g.lerp(m, beta) for g, m in zip(grads, mean, strict=True)])
        for row in [None] if update == "jacobi" else range(3):
            rows = slice(None) if row is None else slice(row, row + 1)
            stats = averaged.move_(grads[rows].clone(), row=row, angle=0.2)
            other = plain.move_(mean[rows].clone(), row=row, angle=0.2)
            assert torch.equal(stats.cosines, other.cosines)
        for system in (averaged, plain):
            system.end_step(stats.densities.tolist())
    assert torch.equal(averaged.masks, plain.masks)
    assert torch.equal(averaged.state_dict()["average"], mean)
    assert plain.state_dict()["average"] is None


def test_a_run_follows_the_plain_loop():
    model, data, config = setting(averaging=0.5)
    beta = decay(config)
    assert beta > 0.6
    short = shortening(config)
    m, _ = plain_run(
        model, data, density_schedule("cubic", 0.4, 6), lambda m, saliency: m.abs() * saliency,
        lambda *given: short * by_angle(*given), beta=beta,
    )  # fmt: skip
    result = SFPKPruner(model, config=config).run(data)
    torch.testing.assert_close(result.particles[0].double(), m, rtol=1e-5, atol=1e-6)


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
    grads[1, 7] = float("inf")
    system.move_(grads.clone(), angle=0.1)
    after = system.state_dict()["average"]
    assert torch.equal(after[1], before[1])
    assert not torch.equal(after[0], before[0])
    assert bool(after.isfinite().all())


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

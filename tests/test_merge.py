"""Several particles until a fraction of the run, then their mean alone."""

import gc
import math
import weakref
from contextlib import nullcontext

import pytest
import torch

from sfpk_kernels import Execution, GradualPruner, SFPKConfig, SFPKPruner, prune
from sfpk_kernels import plan as plan_of
from sfpk_kernels.search import merging, particles
from sfpk_kernels.search.energy import capture, graphed
from sfpk_kernels.search.merging import merge_into, particles_after, passes, steps_of_all
from sfpk_kernels.search.schedule import density_schedule

from .fake_graphs import DEVICE, Machine
from .html_page import Page
from .interruptions import every_moment
from .settings import both
from .test_step_length import plain_run, setting

N, K, MERGE, M = 3, 7, 0.4, 3  # 0.4 · 7 = 2.8


def quick(**options):
    return SFPKConfig(**{"sparsity": 0.8, "n_particles": N, "n_steps": K, "merge": MERGE, **options})


def batches_of(pruner, vectors, step):
    """What a step that follows ``step`` others takes of an endless list of batches."""
    before = passes(pruner.config, step)
    return [vectors[(before + i) % len(vectors)] for i in range(len(pruner.particles))]


def advance(pruner, vectors, until):
    for step in range(len(pruner.history), until):
        pruner.step(batches_of(pruner, vectors, step))


@pytest.mark.parametrize(
    ("steps", "merge", "wanted"),
    [(10, 0.2, 2), (10, 0.21, 3), (10, 0.7, 7), (60, 0.2, 12), (100, 0.07, 7), (3, 0.01, 1), (K, MERGE, M)],
)
def test_the_last_step_of_all(steps, merge, wanted):
    config = quick(n_steps=steps, merge=merge)
    assert steps_of_all(config) == wanted
    assert [particles_after(config, k) for k in range(steps + 1)] == [N] * wanted + [1] * (steps + 1 - wanted)
    assert passes(config) == N * wanted + steps - wanted
    assert steps_of_all(config.replace(merge=None)) == steps_of_all(config.replace(n_particles=1)) == steps
    assert passes(config.replace(merge=None), steps - 1) == N * (steps - 1)


@pytest.mark.parametrize(("steps", "merge"), [(1, 0.2), (5, 0.9), (5, 0.81)])
def test_a_merge_that_leaves_no_step_is_refused(mlp, steps, merge):
    words = f"merge: wanted a fraction that leaves a step for one particle, of n_steps={steps}, got {merge}"
    with pytest.raises(ValueError, match=words):
        SFPKPruner(mlp, config=quick(n_steps=steps, merge=merge))
    SFPKPruner(mlp, config=quick(n_steps=steps, merge=merge, n_particles=1))  # nothing to merge


def test_one_particle_is_merged_with_none(mlp, vectors):
    with_it, without = (prune(mlp, vectors, config=quick(n_particles=1, merge=merge)) for merge in (MERGE, None))
    assert torch.equal(with_it.particles, without.particles)
    assert with_it.energies.tolist() == without.energies.tolist()


@pytest.mark.parametrize("density", ["l2", "l2_squared"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("retract", [True, False])
def test_the_one_is_the_mean(mlp, vectors, dtype, retract, density):
    """Of the particles that another run has after the same steps, in fp64 and rounded once."""
    options = {"particle_dtype": dtype, "retract": retract, "density": density}
    several, merged = (SFPKPruner(mlp, config=quick(merge=merge, **options)) for merge in (None, MERGE))
    advance(several, vectors, M)
    advance(merged, vectors, M - 1)
    assert merged.particles.shape == (N, 144)
    advance(merged, vectors, M)

    def values(pruner):
        residual = pruner._run.system._residual
        return pruner.particles.double() + (0.0 if residual is None else residual.double())

    mean, scheduled = values(several).mean(dim=0, keepdim=True), merged.history[-1].scheduled_density
    assert mean.norm() < 0.999 * values(several).norm(dim=1).mean(), "they differ, so their mean is shorter"
    if retract:
        norm = scheduled if density == "l2" else math.sqrt(scheduled)
        mean *= norm * math.sqrt(144) / mean.norm()
    assert merged.particles.dtype == several.particles.dtype
    torch.testing.assert_close(merged.particles, mean.to(merged.particles.dtype), rtol=2e-7, atol=0)
    torch.testing.assert_close(values(merged), mean, rtol={"float32": 1e-7, "float16": 2**-11, "bfloat16": 2e-5}[dtype],
                               atol=1e-7)  # fmt: skip
    assert merged.history[-1].energies == several.history[-1].energies, "the record is of the step, before the merge"
    result = merged.result()
    assert result.energies.tolist() == [merged.history[-1].energy]
    assert result.mask == result.vote("best") == result.vote("mean")
    if retract:
        assert result.densities.tolist() == pytest.approx([scheduled], rel=1e-3 if dtype == "bfloat16" else 1e-4)


@pytest.mark.parametrize(("update", "mode"), [
    ("jacobi", "sequential"), ("jacobi", "vmap"), ("jacobi", "cudagraph"), ("gauss_seidel", "sequential"),
    ("gauss_seidel", "cudagraph"),
])  # fmt: skip
def test_a_run_follows_the_plain_loop(monkeypatch, update, mode):
    """In fp64: three particles that know nothing of each other, their mean on the schedule, the one."""
    model, _, config = setting(K, n_particles=N, repulsion=0.0, merge=MERGE, update=update)
    data = [(torch.randn(16, 6), torch.randint(0, 4, (16,))) for _ in range(N * M + K - M)]
    density = density_schedule("cubic", 0.4, K)

    def run(data, **options):
        return plain_run(model, data, density, lambda m, saliency: m.abs() * saliency, **options)[0]

    mean = torch.stack([run([data[N * k + i] for k in range(M)], last=M) for i in range(N)]).mean(dim=0)
    mean *= density[M] * math.sqrt(80) / mean.norm()
    wanted = run([None] * M + data[N * M :], m=mean, first=M)
    real = capture.captured
    monkeypatch.setattr(graphed, "captured", lambda once, row, model, device: real(once, row, model, DEVICE))
    with Machine().installed() if mode == "cudagraph" else nullcontext():
        result = SFPKPruner(model, config=config, execution=Execution(energy_mode=mode)).run(data)
    assert result.plan.choice.mode == mode
    torch.testing.assert_close(result.particles[0].double(), wanted, rtol=1e-4, atol=1e-5)


def test_as_many_batches_as_passes(mlp, vectors):
    config, used = quick(), []

    def loader(count):
        for i in range(count):
            used.append(i)
            yield vectors[i % 10]

    count = N * M + K - M
    assert plan_of(mlp, vectors, config=config).passes == count
    result = prune(mlp, loader(count), config=config)
    assert len(used) == count == result.plan.passes == sum(len(record.energies) for record in result.history)
    assert plan_of(mlp, vectors, config=config.replace(merge=None)).passes == N * K
    with pytest.raises(ValueError, match=rf"wanted {count} batches \(one per particle and step\), got a one-shot"):
        prune(mlp, loader(count - 1), config=config)
    words = str(result.plan)
    assert f"s a step of {N}, " in words
    assert f" for {K} ({count} passes)" in words
    total = float(words.split(f"s a step of {N}, ")[1].split(" s for")[0])
    assert total == pytest.approx(result.plan.seconds_per_step * count / N, rel=0.01)


def test_a_step_takes_as_many_batches_as_there_are_particles(mlp, vectors):
    pruner = SFPKPruner(mlp, config=quick())
    advance(pruner, vectors, M)
    with pytest.raises(ValueError, match="batches: wanted a list of 1, one per particle, got 3"):
        pruner.step(vectors[:3])
    assert len(pruner.step(vectors[:1]).energies) == 1


VARIANTS = [
    {},
    {"update": "gauss_seidel", "particle_dtype": "float16", "nonfinite": "skip_particle"},
    {"particle_dtype": "bfloat16", "momentum": 0.2, "vote": "hard", "vote_ratio": 0.5, "kernel": "weighted_rbf"},
    {"step_length": "angle", "hold": 0.7, "consensus_start": 0.0, "signed_score": True, "energy_mode": "vmap"},
    {"selection": "threshold", "retract": False, "early_stop": True, "schedule": "exponential", "offload": "cpu"},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_resumed_at_every_step_bit_for_bit(mlp, vectors, options):
    settings = {**both(quick, **options), "waypoints": [0.3, 0.6], "keep_scores": True}
    whole, states = SFPKPruner(mlp, **settings), []
    whole.add_callback(lambda record: states.append(whole.state_dict()))
    expected = whole.run(vectors)
    assert len(states) == len(expected.history) > M
    again = SFPKPruner(mlp, **settings)
    for step in [*range(1, len(states) + 1), M - 1, M]:  # from one to n particles, too
        again.load_state_dict(states[step - 1])
        assert again.particles.shape == ((N, 144) if step < M else (1, 144))
        result = again.run(vectors)
        assert torch.equal(result.particles, expected.particles)
        assert torch.equal(result.score, expected.score)
        assert result.energies.tolist() == expected.energies.tolist()
        assert [r.energies for r in result.history] == [r.energies for r in expected.history]
        assert [w.mask for w in result.waypoints] == [w.mask for w in expected.waypoints]
        assert result.mask == expected.mask


def change(state, path, value):
    *parts, last = path
    for part in parts:
        state = state[part]
    state[last] = value


@pytest.mark.parametrize(
    ("step", "path", "value", "words"),
    [
        (M, ("particles", "masks"), torch.ones(N, 144), r"masks: wanted shape \(1, 144\), got \(3, 144\)"),
        (M - 1, ("particles", "masks"), torch.ones(1, 144), r"masks: wanted shape \(3, 144\), got \(1, 144\)"),
        (M, ("energies",), torch.ones(N, dtype=torch.float64), r"energies: wanted shape \(1,\), got \(3,\)"),
        (M, ("energies",), torch.ones(1, dtype=torch.float64), "energies: wanted those of the last step of history"),
        (M + 1, ("history", M, "energies"), [1.0] * N, r"history\[3\].energies: wanted 1 entries, got 3"),
        (M + 1, ("history", M - 1, "cosines"), [1.0], r"history\[2\].cosines: wanted 3 entries, got 1"),
        (M, ("taken",), 4, "taken: wanted a multiple of 3 batches, one per particle, got 4"),
        (M + 1, ("taken",), 5, "taken: wanted a multiple of 3 batches, one per particle, and up to 1 of the one after"),
        (M + 1, ("taken",), N * M + 2, "taken: wanted 0 … 10, got 11"),
        (M, ("plan", "passes"), N * K, "plan.passes: wanted 13, got 21"),
    ],
)
def test_damaged_states_are_refused(mlp, vectors, step, path, value, words):
    pruner, other = (SFPKPruner(mlp, config=quick()) for _ in range(2))
    advance(pruner, vectors, step)
    state = pruner.state_dict()
    other.load_state_dict(state)
    change(state, path, value)
    before = other.particles.clone()
    with pytest.raises(ValueError, match=words):
        other.load_state_dict(state)
    assert torch.equal(other.particles, before)
    advance(other, vectors, step + 1)


def test_batches_of_some_steps_may_be_ones_own(mlp, vectors):
    """By step(), those of the loader are not counted: then run() begins at its first."""
    pruner, other = (SFPKPruner(mlp, config=quick()) for _ in range(2))
    advance(pruner, vectors, M)
    seen = []
    pruner.add_callback(lambda record: seen.append(pruner.state_dict()))
    pruner.run(vectors)
    assert [state["taken"] for state in seen] == [1, 2, 3, 4]
    for state in seen:
        other.load_state_dict(state)


@pytest.mark.parametrize("update", ["jacobi", "gauss_seidel"])
def test_the_memory_of_n_particles_is_freed(vectors, update):
    width = 37  # no other tensor has as many rows or columns
    model = torch.nn.Sequential(torch.nn.Linear(8, width), torch.nn.Tanh(), torch.nn.Linear(width, 4))
    pruner = SFPKPruner(model, config=quick(update=update, particle_dtype="bfloat16"))
    d = 12 * width
    advance(pruner, vectors, M - 1)
    system = pruner._run.system
    old = [weakref.ref(system.masks), weakref.ref(system._residual), weakref.ref(pruner._run.energy._grads)]
    advance(pruner, vectors, M)
    gc.collect()
    assert [reference() for reference in old] == [None] * 3
    assert pruner._run.energy._grads is None
    assert (pruner.particles.shape, system._residual.shape) == ((1, d), (1, d))
    assert (system._stats, system._known) == (None, None), "neither of the n particles"
    advance(pruner, vectors, M + 1)
    assert pruner._run.energy._grads.shape == (1, d)
    tensors = [each for each in gc.get_objects() if type(each) is torch.Tensor]
    assert not [tensor.shape for tensor in tensors if tensor.numel() >= N * d and tensor.numel() % d == 0]


def test_interrupted_in_the_merge_it_says_that_it_cannot_go_on(mlp, vectors):
    """Or goes on from the step before; never with some of the particles."""
    pruner = SFPKPruner(mlp, config=quick(particle_dtype="bfloat16", update="gauss_seidel"))
    advance(pruner, vectors, M - 1)
    state, files, refused = pruner.state_dict(), [merging.__file__, particles.__file__], 0
    for raised in every_moment(lambda: (pruner.load_state_dict(state), advance(pruner, vectors, M)), files, step=7):
        assert type(raised) is KeyboardInterrupt
        if pruner._attempt._broken is None:
            assert particles_after(pruner.config, pruner._run.system.step) == len(pruner.particles)
            pruner.state_dict()
            continue
        refused += 1
        for further in (pruner.result, pruner.state_dict, lambda: pruner.step(vectors[:1])):
            with pytest.raises(RuntimeError, match="this run cannot go on"):
                further()
    assert refused > 5
    assert pruner.particles.shape == (1, 144)


def test_no_alarm_of_a_collapse_and_no_deviation(mlp, vectors):
    result = prune(mlp, vectors, config=quick(n_steps=20))
    assert not [alarm for alarm in result.alarms if "collapsed" in alarm]
    records = result.history
    assert all(record.deviation > 0 for record in records[: steps_of_all(result.config)])
    assert all(record.deviation == 0 for record in records[steps_of_all(result.config) :])
    assert records[-1].overlaps == [[1.0]]
    result.knee()


def test_the_mean_in_parts(monkeypatch):
    """As all at once; a mean of zeros stays one."""
    masks = torch.randn(3, 1001, generator=torch.Generator().manual_seed(0))
    whole, parts = torch.empty(1, 1001), torch.empty(1, 1001)
    merge_into(whole, None, masks, None, 0.25)
    monkeypatch.setattr("sfpk_kernels.search.merging._PART", 90)
    merge_into(parts, None, masks, None, 0.25)
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=0)
    assert float(whole.double().square().mean()) == pytest.approx(0.25, rel=1e-6)
    merge_into(parts, None, torch.stack([masks[0], -masks[0]]), None, 0.25)
    assert torch.equal(parts, torch.zeros(1, 1001))


def test_a_particle_that_stood_still_is_part_of_the_mean(mlp, vectors):
    bad = (vectors[0][0] * math.nan, vectors[0][1])
    pruner = SFPKPruner(mlp, config=quick(nonfinite="skip_particle"))
    advance(pruner, vectors, M - 1)
    record = pruner.step([vectors[0], bad, vectors[1]])
    assert record.skipped == [1]
    result = pruner.result()
    assert result.energies.tolist() == [(record.energies[0] + record.energies[2]) / 2]
    other = SFPKPruner(mlp, config=pruner.config)
    other.load_state_dict(pruner.state_dict())
    assert other.result().mask == result.mask


def test_the_report_of_a_merged_run(mlp, vectors, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from sfpk_kernels.report import charts

    real, figures = charts._figure, []

    def keep(*arguments):
        figures.append(real(*arguments))
        return figures[-1]

    monkeypatch.setattr(charts, "_figure", keep)
    result = prune(mlp, vectors, config=quick())
    page = Page(result.report(tmp_path).read_text())
    assert page.facts["steps, particles"][0] == f"{K}, {N}; one after step {M}"
    effective = result.history[M - 1].effective_particles
    assert page.facts["effective particles"][0] == f"{effective:.2f} of {N} at step {M}, the last of all"
    assert {"Loss along the run", "How far apart the particles are"} <= page.terms.keys()
    (left, right) = next(axes for _, axes in figures if not hasattr(axes, "plot"))
    assert [len(line.get_xdata()) for line in (*left.get_lines(), *right.get_lines())] == [M, M], "of the steps of all"


def test_particles_that_merge_between_shots_begin_as_their_mean_on_the_schedule(mlp, vectors, monkeypatch):
    pruner = GradualPruner(mlp, vectors, config=quick(n_steps=12, merge=0.5), shots=2, retrain=lambda *arguments: None)
    pruner.shot()
    several, starts = pruner.result().particles, []

    class Recorded(SFPKPruner):
        def __init__(self, *arguments, start, **options):
            starts.append(start)
            super().__init__(*arguments, start=start, **options)

    monkeypatch.setattr("sfpk_kernels.retraining.gradual.SFPKPruner", Recorded)
    pruner.shot()
    mean = several.double().mean(dim=0, keepdim=True)
    mean *= pruner.shots[1].start_density * math.sqrt(144) / mean.norm()
    assert len(several) == N
    torch.testing.assert_close(starts[0].double(), mean, rtol=1e-6, atol=0)


@pytest.mark.parametrize("merge", [0.4, 0.75])  # in the second of four shots, between the last two
def test_shots_merge_once(mlp, vectors, merge):
    def pruner(model):
        return GradualPruner(
            model, vectors, config=quick(n_steps=12, merge=merge), shots=4, retrain=lambda *arguments: None
        )

    clone = torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.Tanh(), torch.nn.Linear(12, 4))
    clone.load_state_dict(mlp.state_dict())
    gradual, states = pruner(mlp), []
    while not gradual.done:
        gradual.shot()
        states.append(gradual.state_dict())
    result, config = gradual.result(), gradual.config
    found = [len(record.energies) for shot in result.history for record in shot.search]
    assert found == [particles_after(config, k) for k in range(12)]
    assert sum(found) == passes(config)
    assert result.particles.shape == (1, 144)
    for state in states:
        other = pruner(clone)
        other.load_state_dict(state)
        again = other.run()
        assert torch.equal(again.particles, result.particles)
        assert again.masks == result.masks
    states[-1]["particles"] = torch.ones(2, 144)
    with pytest.raises(ValueError, match="particles: wanted shape"):
        pruner(clone).load_state_dict(states[-1])

"""Masks along the way, votes after the run, the loss curve."""

import math

import pytest
import torch
from torch import nn

from sfpk_kernels import MaskSet, SFPKPruner, prune
from sfpk_kernels.ops import transition_
from sfpk_kernels.search import particles
from sfpk_kernels.search.records import StepRecord
from sfpk_kernels.search.result import PruneResult
from sfpk_kernels.search.schedule import density_schedule

from .settings import population


def quick(**overrides):
    options = {"n_particles": 4, "n_steps": 10, **overrides}
    return population(0.8, **options)


def test_masks_are_exact_and_taken_when_the_schedule_passes(mlp, vectors):
    result = prune(mlp, vectors, config=quick(), waypoints=[0.7, 0.3, 0.5, 0.8])
    assert [w.sparsity for w in result.waypoints] == [0.3, 0.5, 0.7, 0.8]
    schedule = [1.0] + [record.scheduled_density for record in result.history]
    for waypoint in result.waypoints:
        assert waypoint.mask.kept == round((1 - waypoint.sparsity) * 144)
        assert schedule[waypoint.step] <= 1 - waypoint.sparsity + 1e-9 < schedule[waypoint.step - 1]
        assert result.mask_at(waypoint.sparsity) == waypoint.mask
        assert waypoint.score is None
    assert result.waypoints[-1].mask == result.mask
    with pytest.raises(ValueError, match="wanted one of 0.3, 0.5, 0.7, 0.8, got 0.6; .* keep_scores=True"):
        result.mask_at(0.6)
    with pytest.raises(ValueError, match="wanted one that the run has passed, 0 to 0.8, got 0.9"):
        result.mask_at(0.9)


def test_a_sparsity_is_found_up_to_rounding_and_only_where_the_run_was(mlp, vectors):
    result = prune(mlp, vectors, config=quick(), waypoints=[0.1 * 3])
    assert result.mask_at(0.3) == result.waypoints[0].mask
    half_way = SFPKPruner(mlp, config=quick(), waypoints=[0.3], keep_scores=True)
    for k in range(4):
        half_way.step(vectors[k : k + 4])
    reached = 1 - half_way.history[-1].scheduled_density
    assert 0.3 < reached < 0.7
    assert half_way.result().mask_at(0.35).kept == round(0.65 * 144)
    with pytest.raises(ValueError, match=f"that the run has passed, 0 to {reached:g}, got 0.7"):
        half_way.result().mask_at(0.7)
    options = {"waypoints": [0.9], "keep_scores": True, "start": result.particles}
    further = prune(mlp, vectors, config=quick().replace(sparsity=0.95), **options)
    assert further.mask_at(0.85).kept == round(0.15 * 144)
    with pytest.raises(ValueError, match="that the run has passed, 0.8 to 0.95, got 0.3"):
        further.mask_at(0.3)


def test_taking_masks_does_not_change_the_run(mlp, vectors):
    plain = prune(mlp, vectors, config=quick(momentum=0.1))
    with_masks = prune(mlp, vectors, config=quick(momentum=0.1), waypoints=[0.5], keep_scores=True)
    assert torch.equal(plain.particles, with_masks.particles)
    assert plain.mask == with_masks.mask


def test_a_mask_is_the_vote_of_the_particles_of_that_step(mlp, vectors):
    result = prune(mlp, vectors, config=quick(), waypoints=[0.5])
    pruner = SFPKPruner(mlp, config=quick())
    for k in range(result.waypoints[0].step):
        pruner.step([vectors[(4 * k + i) % 10] for i in range(4)])
    assert pruner.result().vote("soft", sparsity=0.5) == result.waypoints[0].mask


def test_kept_scores_give_every_sparsity_in_between(mlp, vectors):
    result = prune(mlp, vectors, config=quick(), waypoints=[0.3, 0.6], keep_scores=True)
    for sparsity in (0.1, 0.35, 0.5, 0.62, 0.75):
        assert result.mask_at(sparsity).kept == round((1 - sparsity) * 144)
    nearest = result.waypoints[0].score.topk(round(0.65 * 144)).indices
    assert set(torch.nonzero(result.mask_at(0.35).flat()).flatten().tolist()) == set(nearest.tolist())


@pytest.mark.parametrize(
    ("waypoints", "error", "words"),
    [
        ([0.9], ValueError, "up to the run's 0.8, got 0.9"),
        ([0.0], ValueError, "got 0.0"),
        (["0.5"], TypeError, "wanted sparsities, got '0.5'"),
        (0.5, TypeError, "wanted a list of sparsities"),
    ],
)
def test_bad_waypoints(mlp, waypoints, error, words):
    with pytest.raises(error, match=f"waypoints: .*{words}"):
        SFPKPruner(mlp, config=quick(), waypoints=waypoints)


def test_settling_at_waypoints(mlp, vectors, tmp_path, monkeypatch):
    """The schedule slows down towards each, and the pull begins half-way to the first."""
    pulls = []

    def recorded(*args, **options):
        pulls.append(options["consensus"])
        return transition_(*args, **options)

    monkeypatch.setattr(particles, "transition_", recorded)
    config = quick(settle=True, n_steps=40)
    path = tmp_path / "run"
    result = prune(mlp, vectors, config=config, waypoints=[0.5, 0.7, 0.8], save_every=13, save_path=path)
    densities = [record.scheduled_density for record in result.history]
    assert [1.0, *densities] == density_schedule("cubic", 1 - 0.8, 40, 1.0, [1 - 0.5, 1 - 0.7])
    first = round(40 * math.log(2) / math.log(5))
    assert result.waypoints[0].step == first == 17
    assert result.knee() is None
    assert pulls == [0.0] * 8 + [0.3] * 32
    assert [w.mask.kept for w in result.waypoints] == [72, 43, 29]
    assert prune(mlp, vectors, config=config, waypoints=[0.5, 0.7, 0.8], resume=path).mask == result.mask
    with pytest.raises(ValueError, match="^waypoints, start: wanted those of the saved run, which settles"):
        prune(mlp, vectors, config=config, waypoints=[0.6, 0.7], resume=path)
    with pytest.raises(ValueError, match="^settle: wanted waypoints=.* to settle at, got none"):
        SFPKPruner(mlp, config=config)
    alone = prune(mlp, vectors, config=config, waypoints=[0.8])
    assert alone.mask == prune(mlp, vectors, config=quick(n_steps=40)).mask, "nothing to settle at before the end"


def test_masked_votes_are_of_the_final_sparsity(mlp, vectors):
    for options, words in [
        ({"waypoints": [0.5, 0.8]}, "^waypoints: wanted none below 0.8, got 0.5: the scores of vote='masked'"),
        ({"waypoints": [0.8], "keep_scores": True}, "^keep_scores: wanted False: the scores of vote='masked'"),
    ]:
        with pytest.raises(ValueError, match=words):
            SFPKPruner(mlp, config=quick(vote="masked"), **options)
    result = prune(mlp, vectors, config=quick(vote="masked"), waypoints=[0.8])
    assert result.mask_at(0.8) == result.mask == result.waypoints[0].mask


def test_scores_are_kept_at_waypoints(mlp):
    with pytest.raises(ValueError, match="^keep_scores: wanted waypoints=.* beside it"):
        SFPKPruner(mlp, config=quick(), keep_scores=True)


def test_the_ratio_of_voters_is_not_rounded_up_by_chance(mlp, vectors):
    """0.56 · 25 in fp64 is a little above 14."""
    result = prune(mlp, vectors, config=quick(n_particles=25, n_steps=2, consensus=0.0, polarizer="mask"))
    best = result.energies.argsort()[:14].sort().values
    mask = result.vote("top_ratio", ratio=0.56).flat()
    assert set(torch.nonzero(mask).flatten().tolist()) == set(
        result.particles[best].mean(dim=0).topk(29).indices.tolist()
    )


def test_votes(mlp, vectors, caplog):
    result = prune(mlp, vectors, config=quick(consensus=0.0, polarizer="mask"))
    particles, kept = result.particles, round(0.2 * 144)

    def top(score):
        return set(score.topk(kept).indices.tolist())

    def chosen(mask):
        return set(torch.nonzero(mask.flat()).flatten().tolist())

    best = int(result.energies.argmin())
    assert chosen(result.vote("best")) == top(particles[best])
    assert chosen(result.vote("soft")) == top(particles.mean(dim=0)) == chosen(result.mask)
    assert chosen(result.vote("mean")) == top(particles.mean(dim=0))
    two = result.energies.argsort()[:2]
    assert chosen(result.vote("top_ratio", ratio=0.5)) == top(particles[two].mean(dim=0))
    counts = torch.zeros(144)
    for particle in particles:
        counts[particle.topk(kept).indices] += 1
    hard = result.vote("hard").flat()
    assert counts[hard].min() >= counts[~hard].max()
    assert not caplog.records, "nothing about backends that its fp64 scores cannot take"
    assert result.vote("soft", sparsity=0.5).kept == 72
    with pytest.raises(ValueError, match="rule: wanted one of mean, soft, hard, best, top_ratio, got 'loud'"):
        result.vote("loud")
    with pytest.raises(ValueError, match="ratio"):
        result.vote("top_ratio", ratio=0)
    with pytest.raises(ValueError, match="sparsity"):
        result.vote(sparsity=1.0)
    for wrong in (
        lambda: result.vote("top_ratio", ratio="half"), lambda: result.vote(sparsity="half"),
        lambda: result.mask_at("half"), lambda: result.mask_at(None),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=r"^(ratio|sparsity): wanted a number, got ('half'|None)"):
            wrong()

    probability = torch.cat([p.flatten() for p in result.keep_probability().values()])
    assert torch.equal(probability, counts / 4)
    agreement = torch.cat([p.flatten() for p in result.agreement().values()])
    assert torch.equal(agreement, torch.maximum(counts / 4, 1 - counts / 4))
    core = result.stable_core()
    assert torch.equal(core.flat(), counts == 4)
    assert isinstance(core, MaskSet)


def record(step, density, energies):
    return StepRecord(step, density, [density], energies, [0.0], 0.1, start_density=density)


def with_history(result, history):
    fields = {name: getattr(result, name) for name in result.__dataclass_fields__}
    return PruneResult(**{**fields, "history": history})


def test_curve_and_knee(mlp, vectors):
    result = prune(mlp, vectors, config=quick())
    curve = result.curve()
    assert curve[0]["sparsity"] == 0.0
    assert curve[3]["sparsity"] == pytest.approx(1 - result.history[2].density)
    assert curve[3]["energy"] == pytest.approx(sum(result.history[3].energies) / 4)
    assert curve[3]["lowest"] <= curve[3]["energy"] <= curve[3]["highest"]
    bent = [record(k, 1 - k / 100, [max(0.0, k / 100 - 0.7) ** 2 + 0.1]) for k in range(1, 100)]
    assert with_history(result, bent).knee() == pytest.approx(0.743, abs=0.02)
    flat = [record(k, 1 - k / 100, [1.0 - k / 1000]) for k in range(1, 100)]
    assert with_history(result, flat).knee() is None
    assert with_history(result, bent[:5]).knee() is None
    flattening = [record(k, 1 - k / 100, [math.sqrt(k)]) for k in range(1, 100)]
    assert with_history(result, flattening).knee() is None
    noisy = [record(k, 1 - k / 100, [math.sqrt(k) - 1, math.sqrt(k) + 1]) for k in range(1, 100)]
    noisy[3:7] = [record(k, 1 - k / 100, [0.2, 2.2]) for k in range(4, 8)]  # by chance a little below the chord
    assert with_history(result, noisy).knee() is None
    turning = [record(k, 1 - k / 100, [3.0 * (k > 30) - 0.3, 3.0 * (k > 30) + 0.3]) for k in range(1, 100)]
    assert with_history(result, turning).knee() == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("several", [0, 12])  # steps before particles were merged
def test_one_particle_has_no_knee_within_what_its_batches_differ_by(mlp, vectors, several):
    result = prune(mlp, vectors, config=quick())
    found = {0.0: [], 4.0: []}  # by height of the rise
    for noise in torch.randn(50, 60, dtype=torch.float64).tolist():
        for height, knees in found.items():
            energies = [2.0 + height * max(0.0, (k - 40) / 20) ** 2 + 0.5 * noise[k] for k in range(60)]
            of_step = [[e - 0.4, e + 0.4] if k < several else [e] for k, e in enumerate(energies)]
            knee = with_history(result, [record(k, 1 - k / 60, each) for k, each in enumerate(of_step)]).knee()
            knees += [] if knee is None else [knee]
    assert len(found[0.0]) <= 2
    assert len(found[4.0]) >= 48
    assert all(0.5 < knee < 0.95 for knee in found[4.0])


def test_untrained_networks_have_no_knee():
    knees = []
    for seed in range(12):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4))
        batches = [(torch.randn(16, 8), torch.randint(4, (16,))) for _ in range(10)]
        knees.append(prune(model, batches, config=quick(n_particles=1, n_steps=30, seed=seed)).knee())
    assert knees.count(None) >= 11


def test_a_report_of_numbers(mlp, vectors):
    result = prune(mlp, vectors, config=quick(), waypoints=[0.5])
    assert repr(result).startswith("PruneResult(MaskSet(29 of 144 weights kept")
    assert "masks on the way at [0.5]" in repr(result)
    assert len(repr(result)) < 250
    summary = result.summary()
    assert summary["kept"] == round(0.2 * 144)
    assert math.isfinite(summary["energy"])

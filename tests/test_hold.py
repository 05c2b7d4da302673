"""The target density reached before the end of a run, and held."""

import itertools
import math

import pytest
import torch
from torch import nn

from sfpk_kernels import Execution, SFPKConfig, SFPKPruner
from sfpk_kernels.search.schedule import density_schedule
from sfpk_kernels.search.waypoints import check_waypoints
from tests.test_step_length import plain_run


@pytest.mark.parametrize("hold", [0.7, 0.35, 0.01, 1.0])
@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("cubic", lambda p: 0.1 + 0.9 * (1 - p) ** 3),
        ("linear", lambda p: 1 - 0.9 * p),
        ("exponential", lambda p: 0.1**p),
    ],
)
def test_the_schedule_by_hand(name, rule, hold):
    densities = density_schedule(name, 0.1, 13, hold=hold)
    wanted = [rule(min(1.0, k / (hold * 13))) for k in range(14)]
    assert densities == pytest.approx(wanted, rel=1e-12)
    reached = max(1, math.ceil(hold * 13))
    assert densities[reached:] == [0.1] * (14 - reached)  # to the bit: Δt is 0
    assert all(a > b for a, b in itertools.pairwise(densities[: reached + 1]))


def test_ten_steps_of_which_three_hold():
    assert density_schedule("linear", 0.3, 10, hold=0.7)[6:] == [pytest.approx(0.4), 0.3, 0.3, 0.3, 0.3]


def test_stops_come_before_the_hold():
    densities = density_schedule("cubic", 0.1, 20, 1.0, [0.5, 0.2], hold=0.5)
    assert densities[10:] == [0.1] * 11
    assert {0.5, 0.2} <= set(densities[:10])
    with pytest.raises(ValueError, match="n_steps: wanted ≥ 3, one for every part, got 2 before the hold"):
        density_schedule("cubic", 0.1, 4, 1.0, [0.5, 0.2], hold=0.5)
    config = SFPKConfig(0.9, n_steps=4, settle=True, step_length="angle", hold=0.5)
    with pytest.raises(ValueError, match="n_steps: wanted ≥ 3 to settle at 2 waypoints .* got 2 before the hold, of 4"):
        check_waypoints([0.5, 0.8], config)


@pytest.mark.parametrize("hold", [0.0, -1.0, 1.01, math.nan])
def test_bad_holds_are_named(hold):
    with pytest.raises(ValueError, match=r"density_schedule: hold: wanted a fraction in \(0, 1\]"):
        density_schedule("cubic", 0.1, 4, hold=hold)


def setting(n_steps=10, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    data = [(torch.randn(16, 6), torch.randint(0, 4, (16,))) for _ in range(2 * n_steps)]
    base = {"sparsity": 0.6, "n_particles": 2, "n_steps": n_steps, "step_length": "angle", "hold": 0.5}
    return model, data, SFPKConfig(**{**base, **options})


def test_by_the_radius_nothing_would_move():
    model, _, config = setting(step_length="radius")
    with pytest.raises(ValueError, match="hold: wanted 1 with step_length='radius', .* got 0.5"):
        SFPKPruner(model, config=config)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_recipe_r_by_hand(backend):
    """One particle, score with its sign, angle, hold: the loop of the recipe in fp64."""
    model, data, config = setting(n_particles=1, signed_score=True, hold=0.7)
    density = [0.4 + 0.6 * (1 - min(1.0, k / 7)) ** 3 for k in range(11)]
    m, saliency = plain_run(model, data, density, lambda m, saliency: m * saliency)
    result = SFPKPruner(model, config=config, execution=Execution(backend=backend)).run(data[:10])
    torch.testing.assert_close(result.particles[0].double(), m, rtol=1e-5, atol=1e-6)
    kept = (m * saliency).argsort(descending=True, stable=True)[:32]
    assert result.mask.flat().nonzero().flatten().tolist() == sorted(kept.tolist())


def test_particles_turn_at_one_density():
    model, data, config = setting()
    pruner = SFPKPruner(model, config=config)
    for k in range(10):
        before = pruner.particles.clone()
        record = pruner.step(data[2 * k : 2 * k + 2])
        if k >= 5:
            assert record.scheduled_density == 0.4
            assert record.densities == pytest.approx([0.4, 0.4], rel=1e-6)
            assert not torch.equal(pruner.particles, before)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("update", ["jacobi", "gauss_seidel"])
def test_a_run_resumed_in_the_hold_goes_on_bit_for_bit(update, dtype):
    model, data, config = setting(update=update, particle_dtype=dtype, momentum=0.1)
    whole, first, second = (SFPKPruner(model, config=config, waypoints=[0.3, 0.6]) for _ in range(3))
    for k in range(10):
        whole.step(data[2 * k : 2 * k + 2])
    for k in range(7):
        first.step(data[2 * k : 2 * k + 2])
    second.load_state_dict(first.state_dict())
    for k in range(7, 10):
        second.step(data[2 * k : 2 * k + 2])
    assert torch.equal(whole.particles, second.particles)
    assert whole.result().mask == second.result().mask
    assert [w.step for w in second.result().waypoints] == [w.step for w in whole.result().waypoints]


def test_the_last_waypoint_is_the_final_mask():
    model, data, config = setting()
    result = SFPKPruner(model, config=config, waypoints=[0.3, 0.6]).run(data)
    assert [w.sparsity for w in result.waypoints] == [0.3, 0.6]
    assert result.waypoints[0].step <= 5
    assert result.waypoints[1].step == 10
    assert result.waypoints[1].mask == result.mask
    assert result.mask_at(0.6) == result.mask


def test_a_state_of_another_hold_is_refused():
    model, data, config = setting()
    first = SFPKPruner(model, config=config)
    first.step(data[:2])
    with pytest.raises(ValueError, match=r"difference in hold 0.5 \(now 0.8\)"):
        SFPKPruner(model, config=config.replace(hold=0.8)).load_state_dict(first.state_dict())


def test_the_knee_is_looked_for_where_the_density_falls():
    """The last points lie at one sparsity, where the loss goes down again: no knee is named for them."""
    model, data, config = setting(20, n_particles=1)
    result = SFPKPruner(model, config=config).run(data)
    rising = [0.1] * 6 + [0.2, 0.5, 1.0, 1.6, 2.0]  # of steps 1 to 11, the last of them at the target
    for record, energy in zip(result.history, [*rising, *[0.1] * 9], strict=True):
        record.energies[:] = [energy]
    knee = result.knee()
    assert knee is not None
    assert knee < 0.6

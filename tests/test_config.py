"""Config and schedules: ranges, presets, round trips."""

import dataclasses
import itertools
import json
import math

import pytest

from sfpk_kernels import Execution, SFPKConfig
from sfpk_kernels.config import PRESETS
from sfpk_kernels.search.schedule import density_schedule


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_presets_round_trip(preset):
    config = SFPKConfig.preset(preset, sparsity=0.9, n_particles=3)
    assert config.sparsity == 0.9
    assert config.n_particles == 3
    assert SFPKConfig.from_dict(config.to_dict()) == config
    assert SFPKConfig.from_json(config.to_json()) == config
    assert json.loads(config.to_json())["n_particles"] == 3


def test_presets_are_the_table_of_the_method():
    names = "density schedule polarizer kernel retract consensus momentum repulsion n_particles n_steps radius"
    ours = "signed_score step_length step_scale hold merge"

    def row(preset):
        config = SFPKConfig.preset(preset, sparsity=0.5)
        return tuple(getattr(config, name) for name in names.split())

    def how(preset):
        config = SFPKConfig.preset(preset, sparsity=0.5)
        return tuple(getattr(config, name) for name in ours.split())

    assert row("default") == ("l2", "cubic", "mask_normalized", "rbf", True, 0.3, 0.0, 0.2, 1, 1000, 2.0)
    assert how("default") == (True, "effective_dimension", 1.0, 0.7, None)
    assert row("population") == ("l2", "cubic", "mask_normalized", "rbf", True, 0.3, 0.0, 0.2, 10, 100, 2.0)
    assert {how(name) for name in ("population", "paper", "authors")} == {(False, "radius", 1.0, 1.0, None)}
    assert row("paper") == ("l2_squared", "linear", "mask", "rbf", False, 0.0, 0.0, 0.2, 10, 100, 1.4)
    assert row("authors") == ("l2", "exponential", "mask_weight", "weighted_rbf", False, 0.0, 0.1, 0.2, 10, 100, 1.4)


def test_replace_checks_again():
    config = SFPKConfig(sparsity=0.5)
    assert config.replace(radius=3).radius == 3.0
    with pytest.raises(ValueError, match="radius"):
        config.replace(radius=0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.radius = 3


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("sparsity", 0.0, ValueError),
        ("sparsity", 1.0, ValueError),
        ("sparsity", -0.5, ValueError),
        ("sparsity", float("nan"), ValueError),
        ("sparsity", "0.9", TypeError),
        ("sparsity", True, TypeError),
        ("radius", 1.0, ValueError),
        ("radius", float("inf"), ValueError),
        ("n_particles", 0, ValueError),
        ("n_particles", 2.0, TypeError),
        ("n_steps", 0, ValueError),
        ("n_steps", True, TypeError),
        ("repulsion", -0.1, ValueError),
        ("consensus", 1.1, ValueError),
        ("consensus_start", -0.1, ValueError),
        ("momentum", 1.0, ValueError),
        ("vote_ratio", 0.0, ValueError),
        ("eps", -1.0, ValueError),
        ("seed", -1, ValueError),
        ("retract", 1, TypeError),
        ("settle", None, TypeError),
        ("signed_score", 1, TypeError),
        ("step_length", "long", ValueError),
        ("step_scale", 0.0, ValueError),
        ("hold", 0.0, ValueError),
        ("hold", 1.5, ValueError),
        ("merge", 0.0, ValueError),
        ("merge", 1.0, ValueError),
        ("merge", True, TypeError),
        ("model_mode", "training", ValueError),
        ("kernel", "gauss", ValueError),
        ("density", "l1", ValueError),
        ("schedule", "cosine", ValueError),
        ("polarizer", "random", ValueError),
        ("final_score", "random", ValueError),
        ("vote", "loud", ValueError),
        ("selection", "fuzzy", ValueError),
        ("bn", "eval", ValueError),
        ("update", "lean", ValueError),
    ],
)
def test_bad_values_are_named(field, value, error):
    with pytest.raises(error, match=f"^{field}: wanted .* got"):
        SFPKConfig(**{"sparsity": 0.5, field: value})


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("chunk_size", 0, ValueError),
        ("backend", "fortran", ValueError),
        ("energy_mode", "fast", ValueError),
        ("dtype", "float64", ValueError),
        ("offload", "disk", ValueError),
        ("microbatch", 0, ValueError),
        ("microbatch", 1.5, TypeError),
        ("compile", 1, TypeError),
        ("memory_limit", 0, ValueError),
        ("memory_limit", "4GB", TypeError),
    ],
)
def test_bad_values_of_the_execution_are_named(field, value, error):
    with pytest.raises(error, match=f"^{field}: wanted .* got"):
        Execution(**{field: value})


def test_unknown_names_are_errors():
    with pytest.raises(ValueError, match="preset: wanted one of default, population, paper, authors"):
        SFPKConfig.preset("best", sparsity=0.5)
    with pytest.raises(TypeError, match="unknown field lambda"):
        SFPKConfig.preset("default", sparsity=0.5, **{"lambda": 1})
    with pytest.raises(TypeError, match="sparsity is missing"):
        SFPKConfig.from_dict({"n_steps": 3})


@pytest.mark.parametrize("name", ["linear", "exponential", "cubic"])
@pytest.mark.parametrize(("target", "steps"), [(0.1, 1), (0.02, 100), (0.9, 7)])
def test_schedules_fall_from_one_to_the_target(name, target, steps):
    densities = density_schedule(name, target, steps)
    assert len(densities) == steps + 1
    assert densities[0] == 1.0
    assert densities[-1] == target
    assert all(a > b for a, b in itertools.pairwise(densities))


def test_schedule_values():
    assert density_schedule("linear", 0.2, 4) == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    assert density_schedule("exponential", 0.01, 2) == pytest.approx([1, 0.1, 0.01])
    assert density_schedule("cubic", 0.2, 2) == pytest.approx([1, 0.3, 0.2])
    # The authors' Δt_k = ρ_K ((1/ρ_K)^(1-k/K) - (1/ρ_K)^(1-(k+1)/K))
    target, steps = 0.1, 15
    densities = density_schedule("exponential", target, steps)
    for k in range(steps):
        delta = target * ((1 / target) ** (1 - k / steps) - (1 / target) ** (1 - (k + 1) / steps))
        assert densities[k] - densities[k + 1] == pytest.approx(delta)


@pytest.mark.parametrize("name", ["exponential", "linear", "cubic"])
def test_schedules_with_stops(name):
    densities = density_schedule(name, 0.02, 100, 1.0, [0.2, 0.05])
    corners = [0, round(100 * math.log(5) / math.log(50)), round(100 * math.log(20) / math.log(50)), 100]
    assert [densities[k] for k in corners] == [1.0, 0.2, 0.05, 0.02]
    for begin, end in itertools.pairwise(corners):
        part = density_schedule(name, densities[end], end - begin, densities[begin])
        assert densities[begin : end + 1] == part
    assert all(a > b for a, b in itertools.pairwise(densities))
    assert density_schedule(name, 0.02, 3, 1.0, [0.99, 0.98]) == [1.0, 0.99, 0.98, 0.02]
    assert density_schedule(name, 0.02, 3, 1.0, [0.0202, 0.0201]) == [1.0, 0.0202, 0.0201, 0.02]
    with pytest.raises(ValueError, match="n_steps: wanted ≥ 3, one for every part, got 2"):
        density_schedule(name, 0.02, 2, 1.0, [0.2, 0.05])
    for stops in ([0.05, 0.2], [1.0], [0.02], [0.2, 0.2]):
        with pytest.raises(ValueError, match="stops: wanted densities that fall from 1 to 0.02"):
            density_schedule(name, 0.02, 100, 1.0, stops)


@pytest.mark.parametrize(
    ("arguments", "word"), [(("zigzag", 0.5, 3), "name"), (("linear", 1.0, 3), "target"), (("linear", 0.5, 0), "n_st")]
)
def test_bad_schedules_are_named(arguments, word):
    with pytest.raises(ValueError, match=word):
        density_schedule(*arguments)


def test_vmap_needs_all_particles_where_the_model_is():
    with pytest.raises(ValueError, match="energy_mode: wanted another than 'vmap' with offload"):
        Execution(energy_mode="vmap", offload="cpu")

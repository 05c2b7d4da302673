"""Handmade and altered states: each is refused whole, its entry named, or taken over whole."""

import copy
import math
import random

import pytest
import torch

from sfpk_kernels import Execution, GradualPruner, RetrainConfig, SFPKPruner
from sfpk_kernels.search.energy import ParticleEnergy
from sfpk_kernels.search.particles import ParticleSystem
from sfpk_kernels.utils.files import load_state, save_state

from .altered import alter, places
from .settings import both, population
from .snapshot import Snapshot


def quick(**overrides):
    options = {"n_particles": 3, "n_steps": 5, **overrides}
    return population(0.8, **options)


def equal(a, b):
    """Of nested plain values and tensors, bit for bit, NaN like NaN."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and (a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b)))


def refused_or_whole(state, make, load, read, check, seed, count):
    """Load altered states; what was refused has changed nothing, what was not goes on to its end."""
    draw, taken = random.Random(seed), 0
    target = make()
    before = read(target)
    for _ in range(count):
        altered, words = alter(state, draw)
        error = None
        try:
            load(target, altered)
        except BaseException as raised:
            error = raised
        if error is not None:
            assert isinstance(error, TypeError | ValueError), f"{words}: {type(error).__name__}: {error}"
            assert entry(words) in str(error), f"{words}: {error}"
            assert equal(read(target), before), words
        else:
            taken += 1
            try:
                check(target)
            except Exception as error:
                raise AssertionError(f"taken over: {words}") from error
            target = make()
            before = read(target)
    assert taken < count / 3


def entry(words):
    """The outermost name of the path in the words of an alteration."""
    return words.split("'")[1] if "'" in words else "more"


VARIANTS = [
    {"momentum": 0.1, "vote": "hard"},
    {"dtype": "fp16", "particle_dtype": "bfloat16", "kernel": "weighted_rbf", "update": "gauss_seidel"},
    {"nonfinite": "skip_particle", "energy_mode": "auto", "settle": True, "merge": 0.2},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("count", [300, pytest.param(4000, marks=pytest.mark.slow)])
def test_altered_states_of_a_run(mlp, vectors, options, count):
    settings = both(quick, **options)

    def make():
        return SFPKPruner(mlp, **settings, waypoints=[0.3, 0.6], keep_scores=True)

    pruner = make()
    for k in range(3):
        pruner.step(vectors[3 * k :][: len(pruner.particles)])
    state, snapshot = pruner.state_dict(), Snapshot(mlp)
    assert equal(copy.deepcopy(state), state)

    def check(pruner):
        assert pruner.run(vectors).mask.kept == round(0.2 * 144)
        pruner.state_dict()

    def read(pruner):
        return {
            **pruner.state_dict(),
            "scale": vars(pruner._run.energy.scale).copy(),
            "due": list(pruner._run.waypoints._due),
        }

    refused_or_whole(state, make, SFPKPruner.load_state_dict, read, check, seed=count, count=count)
    fresh = make()
    fresh.load_state_dict(state)
    assert equal(fresh.state_dict(), state)
    snapshot.check()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_altered_states_of_particles(dtype):
    theta, config = torch.rand(40) + 0.1, quick(particle_dtype=dtype)

    def make():
        return ParticleSystem(40, config, Execution(), theta, theta)

    system = make()
    for _ in range(2):
        system.end_step(system.move_(torch.randn(3, 40)).densities.tolist())

    def check(system):
        while not system.done:
            system.end_step(system.move_(torch.randn(3, 40)).densities.tolist())
        assert bool(system.masks.isfinite().all())

    refused_or_whole(
        system.state_dict(), make, ParticleSystem.load_state_dict, ParticleSystem.state_dict, check, seed=0, count=300
    )


@pytest.mark.parametrize("finished", [0, 1, 2])
@pytest.mark.parametrize("count", [150, pytest.param(2000, marks=pytest.mark.slow)])
def test_altered_states_of_shots(convnet, images, finished, count):
    dense = copy.deepcopy(convnet)

    def make():
        convnet.load_state_dict(dense.state_dict())
        retrain = RetrainConfig(0.2, label_smoothing=0.1)
        return GradualPruner(convnet, images, config=quick(n_steps=4), shots=2, retrain=retrain)

    pruner = make()
    for _ in range(finished):
        pruner.shot()

    def check(pruner):
        try:
            assert pruner.run().mask.kept == round(0.2 * pruner.coordinates.d)
        except FloatingPointError:  # of weights of 1e30
            assert pruner.finished >= finished

    refused_or_whole(
        pruner.state_dict(), make, GradualPruner.load_state_dict, GradualPruner.state_dict, check, finished, count
    )


def test_every_entry_is_missed_and_named(mlp, vectors):
    """At every depth: a state without it is refused and says so."""
    pruner = SFPKPruner(mlp, config=quick(momentum=0.1), waypoints=[0.3])
    pruner.step(vectors[:3])
    state, fresh = pruner.state_dict(), SFPKPruner(mlp, config=quick(momentum=0.1), waypoints=[0.3])
    free = ("seconds", "transient", "parts", "model_parts", "alternatives")  # of the plan: what was tried and measured
    for path in places(state):
        if not isinstance(path[-1], str) or (path[-2:-1] and path[-2] in free):
            continue
        altered = copy.deepcopy(state)
        inner = altered
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]
        with pytest.raises(ValueError, match=f"^state: .*without .*'{path[-1]}'"):
            fresh.load_state_dict(altered)
    assert not fresh.history


def test_a_file_whose_content_is_no_state(tmp_path):
    path = tmp_path / "file"
    save_state(path, "kind", {"a": object})
    with pytest.raises(ValueError, match="^path: .* wanted tensors and plain values, got what cannot be read"):
        load_state(path, "kind")


def test_an_interruption_while_loading_is_said(mlp, vectors, monkeypatch):
    pruner = SFPKPruner(mlp, config=quick())
    pruner.step(vectors[:3])
    state = pruner.state_dict()
    pruner.step(vectors[3:6])

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ParticleEnergy, "put_back", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pruner.load_state_dict(state)
    with pytest.raises(RuntimeError, match="^run: this run cannot go on: loading a state stopped half-way"):
        pruner.run(vectors)
    pruner.load_state_dict(state)
    assert equal(pruner.state_dict(), state)

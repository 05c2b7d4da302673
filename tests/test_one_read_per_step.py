"""A step on a GPU waits for it once, at its end; shown on fake CUDA tensors, whose values nobody can read."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from sfpk_kernels import SFPKConfig, SFPKPruner
from sfpk_kernels.search import pruner as module
from sfpk_kernels.search import step_length
from sfpk_kernels.search.particles import ParticleSystem
from sfpk_kernels.search.polarizer import Polarizer
from sfpk_kernels.search.reading import read_together
from sfpk_kernels.search.vote import Vote

pytest.importorskip("triton")

from .recorder import recorded

DEVICE = torch.device("cuda:1")


class Energy:
    """Losses and gradients out of nowhere, on the device."""

    def __init__(self, d):
        self.d = d

    def __call__(self, keep, batches):
        return torch.empty(len(keep), dtype=torch.float64, device=DEVICE), self.buffer(len(keep))

    def buffer(self, rows):
        return torch.empty(rows, self.d, device=DEVICE)

    def state(self):
        return None

    def drop_gradients(self):
        pass

    def one_by_one(self):
        return contextlib.nullcontext()

    def single(self, index, keep, batch, grad):
        return torch.empty((), dtype=torch.float64, device=DEVICE)


def moved_to_the_device(pruner):
    """All that a step touches, as fake tensors; the model itself is not part of it."""
    config, d = pruner.config, pruner.coordinates.d
    theta = pruner._run.theta = torch.empty(d, device=DEVICE)
    pruner._run.polarizer = Polarizer(pruner.coordinates, theta, config.selection, pattern=config.pattern)
    saliency = theta if config.kernel == "weighted_rbf" else None
    pruner._run.system = ParticleSystem(d, config, pruner.execution, theta, saliency)
    pruner._run.vote = Vote(
        pruner._run.polarizer, config.final_score or config.polarizer, config.vote, config.vote_ratio, config.momentum,
        config.sparsity,
    )  # fmt: skip
    for name in ("_places", "_ends", "_counts"):
        tensor = getattr(pruner._run.diagnostics, name)
        setattr(pruner._run.diagnostics, name, torch.empty(tensor.shape, dtype=tensor.dtype, device=DEVICE))
    pruner._run.energy, pruner._run.plan = Energy(d), SimpleNamespace()


def filled(shape, value):
    return [filled(shape[1:], value) for _ in range(shape[0])] if shape else value


CONFIGS = {
    "population": {},
    "lean": {"update": "gauss_seidel"},
    "skip": {"nonfinite": "skip_particle"},
    "lean skip": {"update": "gauss_seidel", "nonfinite": "skip_particle"},
    "pattern": {"sparsity": 0.5, "pattern": (2, 4)},
    "pattern, hard votes": {"sparsity": 0.5, "pattern": (2, 4), "vote": "hard", "momentum": 0.1},
    "weighted": {"kernel": "weighted_rbf", "polarizer": "mask_normalized"},
    "momentum": {"momentum": 0.5, "vote_ratio": 0.5},
    "hard": {"momentum": 0.5, "vote": "hard"},
    "masked": {"momentum": 0.5, "vote": "masked"},
    "early stop": {"early_stop": True},
    "bf16": {"particle_dtype": "bfloat16"},
    "merge": {"merge": 0.3},
    "merge, bf16": {"merge": 0.3, "particle_dtype": "bfloat16"},
    "authors": {"selection": "threshold"},
    "authors, hard": {"selection": "threshold", "momentum": 0.5, "vote": "hard"},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_one_read(mlp, vectors, name, monkeypatch):
    fields = {"sparsity": 0.8, "n_particles": 4, "n_steps": 6, **CONFIGS[name]}
    config = SFPKConfig.preset("population", **fields)
    assert reads_of_three_steps(mlp, vectors, config, monkeypatch) == ["the read"] * 3


@pytest.mark.parametrize(("update", "first"), [("jacobi", 2), ("gauss_seidel", 5)])
def test_the_default_waits_for_the_first_effective_dimensions_too(mlp, vectors, update, first, monkeypatch):
    """Before the moves of step 1: nothing else says how long they are."""
    config = SFPKConfig(0.8, n_particles=4, n_steps=20, update=update)
    assert reads_of_three_steps(mlp, vectors, config, monkeypatch) == ["the read"] * (first + 2)


def reads_of_three_steps(mlp, vectors, config, monkeypatch):
    pruner = SFPKPruner(mlp, config=config)
    with recorded() as recording:

        def read(**tensors):
            recording.waits.append("the read")
            assert {str(tensor.device) for tensor in tensors.values()} == {str(DEVICE)}
            return {name: filled(tuple(tensor.shape), 0.5) for name, tensor in tensors.items()}

        for reader in (module, step_length):
            monkeypatch.setattr(reader, "read_together", read)
        # Their random numbers and the model's modes are on the CPU here.
        monkeypatch.setattr(module, "seeded", lambda seed, device: contextlib.nullcontext())
        moved_to_the_device(pruner)
        # The authors' rule and early stops need densities on the host: before the first step it would have to ask.
        pruner._run.system._known = (pruner.particles._version, [1.0] * 4)
        recording.waits.clear()
        for step in range(1, 4):
            assert not pruner.done
            assert pruner._step(vectors[: len(pruner.particles)]).step == step
    return recording.waits


def test_read_together():
    tensors = {"a": torch.tensor(1.5), "b": torch.tensor([[1, 2], [3, 4]]), "c": torch.zeros(0), "d": torch.ones(1)}
    assert read_together(**tensors) == {"a": 1.5, "b": [[1.0, 2.0], [3.0, 4.0]], "c": [], "d": [1.0]}

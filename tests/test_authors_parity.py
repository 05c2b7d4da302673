"""Preset ``authors`` against trajectories recorded from the authors' released code (tests/data/README.md)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sfpk_kernels import SFPKConfig, SFPKPruner

from .settings import both

DATA = Path(__file__).parent / "data"


def mlp() -> nn.Module:
    # fmt: off
    return nn.Sequential(
        nn.Linear(12, 24, bias=False), nn.Tanh(), nn.Linear(24, 16, bias=False), nn.Tanh(),
        nn.Linear(16, 5, bias=False),
    )


def convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 5, bias=False),
    )
    # fmt: on


@pytest.mark.parametrize("energy_mode", ["sequential", "vmap"])
@pytest.mark.parametrize(("name", "build"), [("authors_mlp", mlp), ("authors_convnet", convnet)])
def test_authors_preset_follows_the_recorded_run(name, build, energy_mode):
    recorded = np.load(DATA / f"{name}.npz")
    model = build()
    model.load_state_dict(
        {key.removeprefix("param:"): torch.tensor(recorded[key]) for key in recorded.files if ":" in key}
    )
    settings = both(
        SFPKConfig.preset,
        "authors",
        sparsity=1 - float(recorded["target_density"]),
        n_particles=int(recorded["n_particles"]),
        n_steps=int(recorded["n_steps"]),
        radius=float(recorded["radius"]),
        repulsion=float(recorded["repulsion"]),
        momentum=float(recorded["momentum"]),
        energy_mode=energy_mode,
    )
    pruner = SFPKPruner(model, loss_fn=lambda net, batch: F.cross_entropy(net(batch[0]), batch[1]), **settings)
    config = pruner.config
    names = [tensor.name for tensor in pruner.coordinates.tensors]
    assert names == list(recorded["names"])
    assert torch.equal(pruner.coordinates.flatten(model), torch.tensor(recorded["theta"]))

    n = config.n_particles
    batches = [(torch.tensor(x), torch.tensor(y)) for x, y in zip(recorded["x"], recorded["y"], strict=True)]
    for k in range(config.n_steps):
        record = pruner.step(batches[k * n : (k + 1) * n])
        expected = torch.tensor(recorded["particles"][k])
        error = (pruner.particles - expected).norm() / expected.norm()
        assert error <= 1e-4, f"step {k}: relative error {error:.2e}"
        np.testing.assert_allclose(record.energies, recorded["energies"][k], rtol=1e-4)
    result = pruner.result()
    np.testing.assert_allclose(result.score.numpy(), recorded["score"], rtol=1e-3, atol=1e-6)
    assert torch.equal(result.mask.flat(), torch.tensor(recorded["mask"]))

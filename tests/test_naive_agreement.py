"""The pruner follows Algorithm 3 as printed (naive.py), step by step, on the same batches."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from sfpk_kernels import SFPKConfig, SFPKPruner
from sfpk_kernels.naive import naive_sfpk

from .settings import both

N, K = 4, 20


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def compare(model, batches, preset="paper", tolerance=1e-4, **options):
    """Run both on the same batches; returns the largest relative error of the particles."""
    settings = both(SFPKConfig.preset, preset, sparsity=0.7, n_particles=N, n_steps=K, **options)
    config, pruner = settings["config"], SFPKPruner(model, loss_fn=loss_fn, **settings)
    names = [tensor.name for tensor in pruner.coordinates.tensors]
    naive = naive_sfpk(
        model,
        loss_fn,
        batches,
        names,
        sparsity=config.sparsity,
        n_particles=N,
        n_steps=K,
        radius=config.radius,
        repulsion=config.repulsion,
        kernel=config.kernel,
        density=config.density,
        schedule=config.schedule,
        polarizer=config.polarizer,
    )
    errors = []
    for k in range(K):
        record = pruner.step(batches[k * N : (k + 1) * N])
        errors.append(float((pruner.particles - naive.trajectory[k]).norm() / naive.trajectory[k].norm()))
        assert record.energies == pytest.approx(naive.energies[k], rel=tolerance)
    assert max(errors) <= tolerance
    assert torch.equal(pruner.result().mask.flat(), naive.mask)
    return max(errors)


@pytest.fixture
def many_vectors():
    return [(torch.randn(16, 8), torch.randint(4, (16,))) for _ in range(N * K)]


@pytest.mark.parametrize(
    ("kernel", "density", "schedule", "polarizer"),
    list(
        itertools.product(
            ["rbf", "weighted_rbf"], ["l2", "l2_squared"], ["linear", "exponential", "cubic"], ["mask", "mask_weight"]
        )
    ),
)
def test_every_option_naive_can_express(mlp, many_vectors, kernel, density, schedule, polarizer):
    options = {"kernel": kernel, "density": density, "schedule": schedule, "polarizer": polarizer}
    # Repulsion far above its usual 0.2, so that a wrong force could not hide.
    compare(mlp, many_vectors, **options, repulsion=20.0)


@pytest.mark.parametrize("energy_mode", ["vmap", "sequential"])
def test_paper_preset_in_fp32(mlp, many_vectors, energy_mode):
    compare(mlp, many_vectors, energy_mode=energy_mode)


def test_paper_preset_in_fp64(mlp, many_vectors):
    batches = [(x.double(), y) for x, y in many_vectors]
    assert compare(mlp.double(), batches, tolerance=1e-10, repulsion=20.0) < 1e-10


def test_paper_preset_on_a_batchnorm_net(convnet):
    images = [(torch.randn(16, 2, 6, 6).double(), torch.randint(4, (16,))) for _ in range(N * K)]
    # naive runs the model in the mode it is in: eval, running statistics.
    compare(convnet.double(), images, tolerance=1e-8, bn="running")

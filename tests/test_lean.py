"""update="gauss_seidel": one gradient at a time, Gauss-Seidel order; cancelling half-way; where particles live."""

import pytest
import torch
from torch import nn

from sfpk_kernels import Execution, SFPKPruner, prune
from sfpk_kernels.ops import transition_

from .settings import population
from .snapshot import Snapshot


def quick(**overrides):
    options = {"n_particles": 3, "n_steps": 6, "update": "gauss_seidel", **overrides}
    return population(0.8, **options)


def test_lean_is_the_same_step_in_gauss_seidel_order(mlp, vectors):
    """Against the reference transition, particle after particle, gradients by plain autograd."""
    config = quick(n_steps=4, consensus=0.2, consensus_start=0.0)
    pruner = SFPKPruner(mlp, config=config)
    theta = pruner.coordinates.flatten(mlp)
    masks = torch.ones(3, 144, dtype=torch.float64)
    schedule = pruner._run.system.schedule
    for k in range(4):
        batches = vectors[3 * k % 10 :][:3]
        batches += vectors[: 3 - len(batches)]
        with torch.no_grad():
            keep = pruner._run.polarizer.polarize(pruner.particles, pruner._run.system.densities, config.polarizer)
            weights = keep.weights(theta).clone()
        moved = masks.clone()
        for i, (x, y) in enumerate(batches):
            net = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4))
            net.load_state_dict(mlp.state_dict())
            _load(net, weights[i])
            nn.functional.cross_entropy(net(x), y).backward()
            grad = torch.cat([net[0].weight.grad.flatten(), net[2].weight.grad.flatten()]).double()
            transition_(
                moved, grad[None], step=schedule[k] - schedule[k + 1], radius=config.radius, repulsion=config.repulsion,
                density=config.density, target_density=schedule[k + 1], consensus=config.consensus,
                weights=theta.double(), row=i, backend="reference",
            )  # fmt: skip
        pruner.step(batches)
        assert torch.allclose(pruner.particles.double(), moved, rtol=0, atol=2e-6), k
        masks = pruner.particles.double()  # rounding must not add up into another mask


def _load(net, weights):
    with torch.no_grad():
        net[0].weight.copy_(weights[:96].view(12, 8))
        net[2].weight.copy_(weights[96:].view(4, 12))


@pytest.mark.parametrize("particle_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kernel", ["rbf", "weighted_rbf"])
def test_exact_count_and_schedule(mlp, vectors, particle_dtype, kernel):
    result = prune(mlp, vectors, config=quick(particle_dtype=particle_dtype, kernel=kernel))
    assert result.mask.kept == round(0.2 * 144)
    assert result.particles.dtype == getattr(torch, particle_dtype)
    assert result.history[-1].density == pytest.approx(0.2, rel=1e-6 if particle_dtype == "float32" else 1e-2)
    assert all(-1 <= c <= 1 for record in result.history for c in record.cosines)
    assert any(record.cosines[0] != 0 for record in result.history)


def test_one_particle_moves_as_in_fast(mlp, vectors):
    lean = prune(mlp, vectors, config=quick(n_particles=1))
    fast = prune(mlp, vectors, config=quick(n_particles=1, update="jacobi"))
    assert torch.allclose(lean.particles, fast.particles, rtol=0, atol=1e-6)
    assert lean.mask == fast.mask


def test_lean_repeats_bit_for_bit_and_step_by_step(mlp, vectors):
    whole = prune(mlp, vectors, config=quick())
    pruner = SFPKPruner(mlp, config=quick())
    for k in range(6):
        pruner.step([vectors[(3 * k + i) % 10] for i in range(3)])
    assert torch.equal(whole.particles, pruner.particles)


class Stop(KeyboardInterrupt):
    pass


def failing(error, step, particle):
    """Fails in that step at that particle; the trial's passes are told apart by their number."""
    calls = iter(range(-4, 10**6))

    def loss_fn(model, batch):
        if next(calls) == 3 * (step - 1) + particle:
            raise error
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    return loss_fn


@pytest.mark.parametrize("error", [Stop(), ValueError("boom"), torch.OutOfMemoryError("no room"), MemoryError()])
@pytest.mark.parametrize("update", ["jacobi", "gauss_seidel"])
@pytest.mark.parametrize("offload", [None, "cpu"])
def test_cancelling_leaves_the_model_and_says_where(mlp, vectors, error, update, offload):
    if hasattr(error, "__notes__"):
        del error.__notes__
    snapshot = Snapshot(mlp)
    pruner = SFPKPruner(
        mlp,
        loss_fn=failing(error, 3, 2),
        config=quick(update=update),
        execution=Execution(offload=offload, energy_mode="sequential"),
    )
    with pytest.raises(type(error)) as caught:
        pruner.run(vectors)
    snapshot.check()
    assert len(pruner.history) == 2
    if hasattr(error, "add_note"):
        notes = "\n".join(caught.value.__notes__)
        assert "energy of particle 2" in notes
        assert "in step 3 of 6" in notes
        assert ("particles 0 … 1 have moved" if update == "gauss_seidel" else "the particles have not moved") in notes
    if update == "gauss_seidel":
        with pytest.raises(RuntimeError, match="cannot go on: step 3 stopped half-way, particles 0 … 1 have moved"):
            pruner.step(vectors[:3])
    else:
        pruner.step(vectors[:3])


def test_a_bad_gradient_in_a_lean_step_names_its_particle(mlp, vectors):
    batches = list(vectors)
    batches[4] = (batches[4][0] * float("nan"), batches[4][1])
    pruner = SFPKPruner(mlp, config=quick())
    with pytest.raises(FloatingPointError, match="finite loss, got nan in step 2, particle 1"):
        pruner.run(batches)


def test_a_first_particle_that_fails_leaves_a_lean_step_to_be_repeated(mlp, vectors):
    pruner = SFPKPruner(mlp, loss_fn=failing(ValueError("boom"), 2, 0), config=quick())
    with pytest.raises(ValueError, match="boom"):
        pruner.run(vectors)
    pruner.step(vectors[:3])
    assert len(pruner.history) == 2


def test_offload_on_a_model_in_host_memory_changes_nothing(mlp, vectors):
    plain = prune(mlp, vectors, config=quick())
    offloaded = prune(mlp, vectors, config=quick(), execution=Execution(offload="cpu"))
    assert torch.equal(plain.particles, offloaded.particles)


@pytest.mark.gpu
@pytest.mark.parametrize("update", ["jacobi", "gauss_seidel"])
def test_offload_on_a_gpu(mlp, vectors, update):
    import copy

    here = prune(mlp, vectors, config=quick(update=update))
    result = prune(copy.deepcopy(mlp).cuda(), vectors, config=quick(update=update), execution=Execution(offload="cpu"))
    assert result.particles.device.type == "cpu"
    assert result.particles.is_pinned()
    assert torch.allclose(result.particles, here.particles, rtol=0, atol=1e-3)
    assert result.mask.kept == here.mask.kept
    assert "masked weights" in result.plan.model_parts

"""Scores with their sign: a weight whose particle value is below 0 ranks last, in polarizer, vote and final mask."""

import pytest
import torch
from torch import nn

from sfpk_kernels import Coordinates, SFPKConfig, SFPKPruner
from sfpk_kernels.search.polarizer import Polarizer
from sfpk_kernels.search.vote import Vote

KINDS = ["mask", "mask_weight", "mask_normalized"]


def model_and_masks(n=3):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 4, bias=False))
    masks = torch.randn(n, 80)  # about half of them below 0
    masks[:, :3] = torch.tensor([0.0, -0.0, -5.0])
    return model, masks


def by_hand(model, masks, kind):
    """m ⊙ a, written out."""
    parts = [p.detach().abs() for p in model.parameters()]
    if kind == "mask":
        parts = [torch.ones_like(p) for p in parts]
    if kind == "mask_normalized":
        parts = [p / p.double().mean().float() for p in parts]
    return masks * torch.cat([p.flatten() for p in parts])


def polarizer_of(model, selection="exact", backend=None, signed=True):
    coordinates = Coordinates(model)
    return Polarizer(coordinates, coordinates.flatten(model), selection, backend, signed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", [None, "cpp", "reference"])
def test_the_binary_particles_are_the_best_by_the_signed_score(kind, backend):
    model, masks = model_and_masks()
    theta, scores = Coordinates(model).flatten(model), by_hand(model, masks, kind)
    densities = torch.tensor([0.1, 0.4, 0.9], dtype=torch.float64)
    keep = polarizer_of(model, backend=backend).polarize(masks, densities, kind)
    for row, kept in enumerate(keep.weights(theta) != 0):
        order = scores[row].sort(descending=True, stable=True).indices[: round(float(densities[row]) * 80)]
        assert kept.nonzero().flatten().tolist() == sorted(order.tolist())


@pytest.mark.parametrize("kind", KINDS[1:])
def test_without_the_sign_a_large_negative_value_is_kept(kind):
    model, masks = model_and_masks()
    masks[:, 5] = -50.0
    density = torch.full((3,), 0.1, dtype=torch.float64)
    theta = Coordinates(model).flatten(model)
    kept = [polarizer_of(model, signed=s).polarize(masks, density, kind).weights(theta)[:, 5] != 0 for s in (0, 1)]
    assert kept[0].all()
    assert not kept[1].any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_authors_threshold_takes_the_signed_score(kind):
    model, masks = model_and_masks()
    keep = polarizer_of(model, "threshold").polarize(masks, torch.full((3,), 0.25, dtype=torch.float64), kind)
    score = by_hand(model, masks, kind)
    torch.testing.assert_close(keep.values, (score >= score.kthvalue(60, dim=1, keepdim=True).values).float())


@pytest.mark.parametrize("kind", KINDS)
def test_votes(kind):
    model, masks = model_and_masks()
    scores, energies, densities = by_hand(model, masks, kind), [0.3, 0.1, 0.2], [0.3] * 3

    def vote(rule, ratio=1.0):
        return Vote(polarizer_of(model), kind, rule, ratio, 0.0, 0.7).update(masks, densities, energies)

    torch.testing.assert_close(vote("soft"), scores.mean(dim=0))
    torch.testing.assert_close(vote("soft", 0.5), scores[1:].mean(dim=0))
    best = torch.zeros_like(scores).scatter(1, scores.topk(24, dim=1).indices, 1.0)
    torch.testing.assert_close(vote("masked"), (scores * best).mean(dim=0))
    counts = vote("hard").floor()
    torch.testing.assert_close(counts.float(), best.sum(dim=0))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("update", ["jacobi", "gauss_seidel"])
def test_a_run_ends_with_the_best_by_the_signed_score(dtype, update):
    model, _ = model_and_masks()
    torch.manual_seed(1)
    data = [(torch.randn(16, 6), torch.randint(0, 4, (16,))) for _ in range(4)]
    config = SFPKConfig.preset(
        "population", sparsity=0.5, n_particles=2, n_steps=12, radius=12.0, signed_score=True, particle_dtype=dtype,
        update=update,
    )  # fmt: skip
    result = SFPKPruner(model, config=config).run(data)
    assert (result.particles < 0).any()  # else the sign would be no matter
    score = by_hand(model, result.particles.float(), "mask_normalized").mean(dim=0)
    torch.testing.assert_close(result.score, score, rtol=2e-3 if dtype == "float16" else 1e-5, atol=1e-4)
    kept = result.mask.flat()
    best = result.score.sort(descending=True, stable=True).indices[:40]
    assert kept.nonzero().flatten().tolist() == sorted(best.tolist())
    unsigned = SFPKPruner(model, config=config.replace(signed_score=False)).run(data)
    assert not torch.equal(unsigned.score, result.score)

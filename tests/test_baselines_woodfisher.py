"""WoodFisher: its blocks against the dense matrix, exact where the loss is quadratic."""

import copy

import pytest
import torch
from torch import nn

from sfpk_kernels import Coordinates, baselines
from sfpk_kernels.baselines.woodfisher import in_blocks, inverses, obs_update

from .snapshot import Snapshot


def gradients(model, batches):
    rows = []
    for x, y in batches:
        grads = torch.autograd.grad(
            nn.functional.cross_entropy(model(x), y), Coordinates(model).parameters(model)
        )  # fmt: skip
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    return torch.stack(rows)


@pytest.mark.parametrize("block", [7, 48, 1000])
def test_scores_and_updates_are_those_of_the_dense_matrix(mlp, vectors, block):
    model, batches = mlp.double(), [(x.double(), y) for x, y in vectors]
    g, theta = gradients(model, batches), Coordinates(model).flatten(model)
    fisher = g.T @ g / len(g)
    cut = torch.zeros_like(fisher)
    for begin, end in ((0, 96), (96, 144)):  # the two tensors
        for i in range(begin, end, block):
            place = slice(i, min(i + block, end))
            cut[place, place] = fisher[place, place]
    inverse = torch.linalg.inv(cut + 1e-3 * torch.eye(144, dtype=torch.float64))
    score = theta.square() / (2 * inverse.diagonal())
    pruned = copy.deepcopy(model)
    masks = baselines.woodfisher_update_(pruned, batches, 0.7, damping=1e-3, block=block)
    kept = masks.flat()
    assert set(kept.nonzero().flatten().tolist()) == set(score.topk(43).indices.tolist())
    rest = (~kept).nonzero().flatten()
    change = inverse[:, rest] @ torch.linalg.solve(inverse[rest][:, rest], theta[rest])
    found = Coordinates(pruned).flatten(pruned)
    torch.testing.assert_close(found, (theta - change) * kept, rtol=1e-8, atol=1e-10)
    assert found[~kept].count_nonzero() == 0
    assert masks == baselines.woodfisher(model, batches, 0.7, damping=1e-3, block=block)


def test_the_inverse_of_blocks_is_woodburys():
    g = torch.randn(6, 10, dtype=torch.float64)
    inverse = torch.eye(10, dtype=torch.float64) / 0.1
    for row in g:  # F⁻¹ ← F⁻¹ - F⁻¹ g gᵀ F⁻¹ / (N + gᵀ F⁻¹ g), from 1/λ
        left = inverse @ row
        inverse = inverse - torch.outer(left, left) / (len(g) + row @ left)
    fisher = g.T @ g / len(g) + 0.1 * torch.eye(10, dtype=torch.float64)
    torch.testing.assert_close(inverses(fisher.unsqueeze(0))[0], inverse)


def test_taking_out_one_weight_is_the_papers_update():
    root = torch.randn(5, 5, dtype=torch.float64)
    fisher, weight = root @ root.T + torch.eye(5), torch.randn(5, dtype=torch.float64)
    keep = torch.tensor([True, True, False, True, True])
    inverse = torch.linalg.inv(fisher)
    expected = weight - weight[2] / inverse[2, 2] * inverse[:, 2]
    found = obs_update(fisher.unsqueeze(0), weight.unsqueeze(0), keep.unsqueeze(0))[0]
    torch.testing.assert_close(found, expected * keep)


def test_it_is_exact_on_a_quadratic():
    """Least squares at its minimum with residuals of ±1: the empirical Fisher matrix is the Hessian."""
    x = torch.randn(20, 8, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(8, 1, bias=False)).double()
    targets = model(x).detach()
    batches = [(row[None], y + sign) for row, y in zip(x, targets, strict=True) for sign in (1.0, -1.0)]
    masks = baselines.woodfisher_update_(
        model, batches, 0.5, loss_fn=lambda net, b: 0.5 * (net(b[0]) - b[1]).square().sum(), damping=1e-12
    )
    kept = masks.flat()
    expected = torch.linalg.lstsq(x[:, kept], targets).solution.flatten()
    torch.testing.assert_close(model[0].weight.detach().flatten()[kept], expected, rtol=1e-7, atol=1e-7)


def test_blocks_are_padded():
    assert in_blocks(torch.arange(5.0), 3).tolist() == [[0, 1, 2], [3, 4, 0]]
    assert in_blocks(torch.arange(4.0), 2).tolist() == [[0, 1], [2, 3]]


def test_counts_and_the_model_that_is_not_changed(convnet, images):
    snapshot = Snapshot(convnet)
    for allocation in ("global", "uniform", "erk"):
        masks = baselines.woodfisher(convnet, images, 0.913, allocation=allocation, max_batches=3)
        assert masks.kept == round(0.087 * Coordinates(convnet).d)
    snapshot.check()
    with pytest.raises(FloatingPointError, match="in batch 1"):
        baselines.woodfisher_update_(convnet, [images[0], (images[1][0] * float("nan"), images[1][1])], 0.5)
    snapshot.check()


def test_bad_input_is_named(mlp, vectors):
    for options, words in (
        ({"damping": 0.0}, "damping: wanted a finite number > 0, got 0.0"),
        ({"damping": 1e-300}, "damping: wanted enough for positive definite blocks"),
        ({"block": 0}, "block: wanted ≥ 1, got 0"),
        ({"allocation": "lamp"}, "allocation: wanted one of global, uniform, erk, got 'lamp'"),
        ({"max_batches": 0}, "max_batches: wanted ≥ 1 or None, got 0"),
        ({"loss_fn": lambda net, batch: net(batch[0]).sum() * 0}, "loss_fn: wanted a loss that changes"),
    ):
        with pytest.raises(ValueError, match=words):
            baselines.woodfisher(mlp, vectors, 0.5, **options)
    with pytest.raises(ValueError, match="loader: wanted batches"):
        baselines.woodfisher(mlp, [], 0.5)
    with pytest.raises(TypeError, match="blocks"):
        baselines.woodfisher(mlp, vectors, 0.5, blocks=3)

"""Wanda and SparseGPT: against the formulas by hand, brute force on small layers, convolutions by their own outputs."""

import copy

import pytest
import torch
from torch import nn

from sfpk_kernels import Coordinates, baselines
from sfpk_kernels.baselines.sparsegpt import inverse_factor, prune_matrix, share
from sfpk_kernels.modeling.layers import find_layers

from .snapshot import Snapshot


@pytest.mark.parametrize(
    "options",
    [
        {}, {"stride": 2, "padding": 1}, {"padding": "same", "dilation": 2}, {"groups": 2, "padding": (1, 0)},
        {"padding": 1, "padding_mode": "circular"}, {"groups": 4}, {"kernel_size": (1, 3)},
    ],
    ids=str,
)  # fmt: skip
def test_the_columns_of_a_convolution_give_its_output(options):
    conv = nn.Conv2d(4, 8, **{"kernel_size": 3, "bias": False, **options}).double()
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    (layer,) = find_layers(conv, Coordinates(conv))
    matrices = layer.matrices(conv.weight.detach())
    torch.testing.assert_close(layer.weight(matrices), conv.weight.detach(), rtol=0, atol=0)
    expected = conv(x).detach()
    products = layer.columns(conv, x) @ matrices.transpose(1, 2)  # (G, N · H · W, R)
    found = products.view(layer.groups, 2, expected.shape[2], expected.shape[3], -1).permute(1, 0, 4, 2, 3)
    torch.testing.assert_close(found.reshape(expected.shape), expected)
    torch.testing.assert_close(layer.columns(conv, x[0]), layer.columns(conv, x[:1]))


def test_wanda_with_inputs_of_equal_norm_is_magnitude_by_row():
    model = nn.Sequential(nn.Linear(8, 6))
    masks = baselines.wanda(model, [torch.eye(8)], 0.7)
    for row, kept in zip(model[0].weight.detach().abs(), masks["0.weight"], strict=True):
        assert set(kept.nonzero().flatten().tolist()) == set(row.topk(round(0.3 * 8)).indices.tolist())


@pytest.mark.parametrize("sequential", [True, False])
def test_wanda_by_hand(mlp, vectors, sequential):
    masks = baselines.wanda(mlp, vectors, 0.5, sequential=sequential, max_batches=4)
    x = torch.cat([x for x, _ in vectors[:4]])
    first, second = mlp[0].weight.detach(), mlp[2].weight.detach()
    kept = masks["0.weight"]
    for row, mask in zip(first.abs() * x.norm(dim=0), kept, strict=True):
        assert set(mask.nonzero().flatten().tolist()) == set(row.topk(4).indices.tolist())
    met = torch.tanh(nn.functional.linear(x, first * kept if sequential else first, mlp[0].bias.detach()))
    for row, mask in zip(second.abs() * met.norm(dim=0), masks["2.weight"], strict=True):
        assert set(mask.nonzero().flatten().tolist()) == set(row.topk(6).indices.tolist())
    assert masks.kept == 12 * 4 + 4 * 6


def test_wanda_of_convolutions_and_patterns():
    model = nn.Sequential(nn.Conv2d(8, 6, 3, groups=2), nn.ReLU(), nn.Conv2d(6, 4, 1))
    batches = [torch.randn(2, 8, 5, 5) * torch.arange(1, 9).view(8, 1, 1) for _ in range(2)]
    masks = baselines.wanda(model, batches, 0.7)
    assert masks["0.weight"].flatten(1).sum(1).tolist() == [round(0.3 * 36)] * 6
    assert masks["2.weight"].flatten(1).sum(1).tolist() == [round(0.3 * 6)] * 4
    with pytest.raises(ValueError, match="tensors with a multiple of 4 inputs, got 2.weight"):
        baselines.wanda(model, batches, 0.5, pattern=(2, 4))
    first = baselines.wanda(model, batches, 0.5, pattern=(2, 4), ignored_layers=["2"])["0.weight"]
    patches = nn.functional.unfold(torch.cat(batches), 3).view(4, 8, 9, 9)  # samples, channels, kernel, places
    norms = patches.square().sum(dim=(0, 3)).sqrt().view(2, 4, 3, 3)
    score = model[0].weight.detach().abs() * norms.repeat_interleave(3, dim=0)
    expected = torch.zeros_like(first).scatter_(1, score.topk(2, dim=1).indices, True)
    assert torch.equal(first, expected)


def by_brute_force(weight, hessian, kept):
    """Optimal brain surgeon, column by column from the left, with a matrix inverted for each."""
    weight = weight.clone()
    for row, keep in zip(weight, kept, strict=True):
        for j in range(len(row)):
            if not keep[j]:
                inverse = torch.linalg.inv(hessian[j:, j:])
                row[j:] -= row[j].clone() / inverse[0, 0] * inverse[0]
    return weight * kept


@pytest.mark.parametrize("block", [1, 3, 7, 128])
def test_sparsegpt_against_brute_force(block):
    x, weight = torch.randn(40, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    gram = x.T @ x
    hessian = gram + 0.01 * gram.diagonal().mean() * torch.eye(7, dtype=torch.float64)
    unused = torch.zeros(7, dtype=torch.bool)
    mask, mended = prune_matrix(weight, inverse_factor(gram, 0.01, "w"), unused, 14, None, block)
    assert int(mask.sum()) == 14
    torch.testing.assert_close(mended, by_brute_force(weight, hessian, mask))
    # Each block's weights are chosen by what the updates so far have made of them.
    for begin in range(0, 7, block):
        end = min(7, begin + block)
        before = mask.clone()
        before[:, begin:] = True
        now = by_brute_force(weight, hessian, before)[:, begin:end]
        gains = torch.tensor([float(torch.linalg.inv(hessian[j:, j:])[0, 0]) for j in range(begin, end)])
        score = (now.square() / gains).flatten()
        best = set(score.topk(share(14, begin, end, 7)).indices.tolist())
        assert set(mask[:, begin:end].flatten().nonzero().flatten().tolist()) == best


def test_sparsegpt_updates_lower_the_error_of_the_outputs():
    x, weight = torch.randn(200, 32) @ torch.randn(32, 32), torch.randn(16, 32)
    gram = (x.T @ x).double()
    mask, mended = prune_matrix(weight, inverse_factor(gram, 0.01, "w").float(), gram.diagonal() == 0, 256, None, 8)
    assert (x @ (mended - weight).T).norm() < 0.85 * (x @ (weight * mask - weight).T).norm()


def test_sparsegpt_with_a_diagonal_hessian_updates_nothing():
    model = nn.Sequential(nn.Linear(8, 6, bias=False))
    scales = torch.arange(1.0, 9.0)
    before = model[0].weight.detach().clone()
    masks = baselines.sparsegpt_update_(model, [torch.diag(scales)], 0.5, damping=1e-9)
    assert torch.equal(model[0].weight.detach(), before * masks["0.weight"])
    best = (before.abs() * scales).flatten().topk(24).indices
    assert set(masks.flat().nonzero().flatten().tolist()) == set(best.tolist())


def test_unused_inputs_go_first():
    model = nn.Sequential(nn.Linear(8, 6, bias=False))
    x = torch.randn(30, 8)
    x[:, [2, 5]] = 0
    masks = baselines.sparsegpt(model, [x], 0.25)
    assert not bool(masks["0.weight"][:, [2, 5]].any())
    assert masks.kept == 36


def test_masks_alone_are_those_of_the_update(convnet, images):
    snapshot, pruned = Snapshot(convnet), copy.deepcopy(convnet)
    masks = baselines.sparsegpt(convnet, images, 0.8)
    snapshot.check()
    assert masks.kept == round(0.2 * Coordinates(convnet).d)
    own = {name: id(p) for name, p in pruned.named_parameters()}
    assert baselines.sparsegpt_update_(pruned, images, 0.8) == masks
    assert {name: id(p) for name, p in pruned.named_parameters()} == own
    for name in masks:
        weight = pruned.get_parameter(name).detach()
        assert weight[~masks[name]].count_nonzero() == 0
        assert not torch.equal(weight, convnet.get_parameter(name).detach() * masks[name])
    assert masks != baselines.sparsegpt(convnet, images, 0.8, sequential=False)
    erk = baselines.sparsegpt(convnet, images, 0.8, allocation="erk")
    assert erk.layer_densities() == baselines.magnitude(convnet, 0.8, allocation="erk").layer_densities()
    baselines.wanda(convnet, images, 0.8)
    snapshot.check()


def test_sparsegpt_patterns(mlp, vectors):
    masks = baselines.sparsegpt(mlp, vectors, 0.5, pattern=(2, 4))
    for name in masks:
        assert (masks[name].view(-1, 4).sum(1) == 2).all()
    # Within one block, groups are chosen one after another; the first of each row sees the weights as they are.
    gram = sum(x.T @ x for x, _ in vectors).double()
    factor = inverse_factor(gram, 0.01, "w")
    first = (mlp[0].weight.detach().double() / factor.diagonal()).square()[:, :4].topk(2, dim=1).indices
    assert torch.equal(masks["0.weight"][:, :4], torch.zeros(12, 4, dtype=torch.bool).scatter_(1, first, True))


def test_an_error_leaves_the_weights(mlp, vectors):
    snapshot = Snapshot(mlp)
    for batches in ([vectors[0], (vectors[0][0] * float("nan"), vectors[0][1])], [vectors[0], "broken"]):
        with pytest.raises((FloatingPointError, TypeError)):
            baselines.sparsegpt_update_(mlp, batches, 0.5)
        snapshot.check()
        assert not any(module._forward_pre_hooks for module in mlp.modules())


@pytest.mark.parametrize("method", [baselines.wanda, baselines.sparsegpt])
def test_bad_input_is_named(method, mlp, vectors):
    for call, words in (
        (lambda: method(mlp, [], 0.5), "loader: wanted batches"),
        (lambda: method(mlp, vectors, 1.0), "sparsity: wanted"),
        (lambda: method(mlp, vectors, 0.5, max_batches=0), "max_batches: wanted ≥ 1 or None"),
        (lambda: method(mlp, vectors, 0.5, pattern=(1, 4)), r"sparsity: wanted 0.75, that of pattern=\(1, 4\)"),
        (lambda: method(mlp, vectors, 0.5, include_biases=True), r"wanted weights of Linear and Conv2d .* got 0.bias"),
        (lambda: method(nn.Sequential(nn.Conv1d(2, 2, 3)), vectors, 0.5), r"got 0.weight \(Conv1d\), for which"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(FloatingPointError, match="loader: wanted finite inputs of every layer, got others at 0.weight"):
        method(mlp, [vectors[0][0] / 0], 0.5)

    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.other = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x):
            return self.used(x)

    with pytest.raises(ValueError, match="wanted layers that are called with the batches, got other.weight"):
        method(Unused(), vectors, 0.5)
    assert list(method(Unused(), vectors, 0.5, ignored_layers=["other"])) == ["used.weight"]


def test_options_of_sparsegpt_are_checked(mlp, vectors):
    with pytest.raises(ValueError, match="damping: wanted a finite number > 0, got 0"):
        baselines.sparsegpt(mlp, vectors, 0.5, damping=0)
    with pytest.raises(ValueError, match="block: wanted ≥ 1, got 0"):
        baselines.sparsegpt(mlp, vectors, 0.5, block=0)
    with pytest.raises(ValueError, match="allocation: wanted one of uniform, erk, got 'global'"):
        baselines.sparsegpt(mlp, vectors, 0.5, allocation="global")

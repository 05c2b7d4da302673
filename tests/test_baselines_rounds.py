"""FORCE, iterative SNIP and SynFlow, which score anew in rounds; GraSP, which looks at second derivatives."""

import copy
import itertools

import pytest
import torch
from torch import nn

from sfpk_kernels import Coordinates, baselines
from sfpk_kernels.baselines.synflow import _absolute, synaptic_flow

from .snapshot import Snapshot


def test_force_in_one_round_is_snip(convnet, images):
    one = baselines.force(convnet, images, 0.8, rounds=1, batches_per_round=3)
    assert one == baselines.snip(convnet, images, 0.8, max_batches=3)
    assert one == baselines.force(convnet, images, 0.8, rounds=1, batches_per_round=3, revive=False)
    assert one != baselines.force(convnet, images, 0.8, rounds=5)


@pytest.mark.parametrize("revive", [True, False])
def test_force_by_hand(mlp, vectors, revive):
    model, rounds = mlp.double(), 6
    batches = [(x.double(), y) for x, y in vectors]
    parameters = Coordinates(model).parameters(model)
    theta = torch.cat([p.detach().flatten() for p in parameters])
    mask, returned = torch.ones(144, dtype=torch.bool), 0
    for k in range(1, rounds + 1):
        thinned = copy.deepcopy(model)
        for parameter, part in zip(
            Coordinates(thinned).parameters(thinned), (theta * mask).split([96, 48]), strict=True
        ):
            parameter.data = part.view_as(parameter)
        nn.functional.cross_entropy(thinned(batches[k - 1][0]), batches[k - 1][1]).backward()
        grads = torch.cat([p.grad.flatten() for p in Coordinates(thinned).parameters(thinned)])
        score = (theta * grads).abs()
        if not revive:
            score[~mask] = -1
        before, mask = mask, torch.zeros_like(mask)
        mask[score.topk(round(0.2 ** (k / rounds) * 144)).indices] = True
        returned += int((mask & ~before).sum())
    assert (returned > 0) == revive
    assert torch.equal(baselines.force(model, batches, 0.8, rounds=rounds, revive=revive).flat(), mask)


@pytest.fixture
def plain():
    """Convolutions, pooling and linear layers without biases: flow is conserved."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 2, bias=False), nn.ReLU(),
        nn.Flatten(), nn.Linear(24, 5, bias=False),
    )  # fmt: skip


def test_synflow_conserves_the_sums_of_layers(plain):
    coordinates = Coordinates(plain)
    ones = torch.ones(1, 1, 8, 8, dtype=torch.float64)
    weights = coordinates.flatten(plain).double().abs()
    for masks in (torch.ones(coordinates.d, dtype=torch.bool), baselines.random(plain, 0.5).flat()):
        score = synaptic_flow(_absolute(plain), coordinates, weights * masks, ones)
        sums = [float(part.sum()) for part in coordinates.split(score)]
        assert sums == pytest.approx([sums[0]] * 3, rel=1e-12)
        assert score[~masks].count_nonzero() == 0


def test_synflow_empties_no_layer(plain):
    example = torch.randn(3, 1, 8, 8)
    masks = baselines.synflow(plain, 0.95, example=example)
    d = Coordinates(plain).d
    assert masks.kept == round(0.05 * d)
    assert min(masks.layer_densities().values()) > 0
    # Every kept weight lies on a path from input to output.
    kept = masks.flat()
    score = synaptic_flow(
        _absolute(plain), Coordinates(plain), Coordinates(plain).flatten(plain).double().abs() * kept,
        torch.ones(1, 1, 8, 8, dtype=torch.float64),
    )  # fmt: skip
    assert bool((score[kept] > 0).all())
    assert masks == baselines.synflow(plain, 0.95, example=(example * 0, None))  # floats become ones


def test_synflow_in_one_round_by_hand():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -2.0], [3.0, 4.0]]))
        model[1].weight.copy_(torch.tensor([[-5.0, 0.5]]))
    # |w| times what flows on: [1, 2] · 5 and [3, 4] · 0.5; at the end 3 · 5 and 7 · 0.5.
    masks = baselines.synflow(model, 0.5, example=torch.zeros(1, 2), rounds=1)
    assert masks.flat().tolist() == [True, True, False, False, True, False]


def test_synflow_takes_trained_batch_norm_and_tokens(convnet):
    masks = baselines.synflow(convnet, 0.9, example=torch.randn(2, 2, 6, 6), rounds=20)
    assert masks.kept == round(0.1 * Coordinates(convnet).d)
    tokens = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    assert baselines.synflow(tokens, 0.5, example=torch.tensor([[1, 2, 3]]), rounds=5).kept == 21


def of_weights(a):
    """A loss that is quadratic in the weights, ½ wᵀ A w; its gradient is A w, its Hessian A."""

    def loss(model, batch):
        w = torch.cat([p.flatten() for p in (model[0].weight, model[1].weight)])
        return batch * 0.5 * w @ a @ w

    return loss


def test_grasp_on_a_quadratic():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)).double()
    w = torch.cat([p.detach().flatten() for p in model.parameters()])
    root = torch.randn(6, 6, dtype=torch.float64)
    a = root + root.T
    score = w * (a @ a @ w)
    assert bool((score < 0).any())
    batches = [torch.tensor(0.5), torch.tensor(1.5)]  # mean 1
    masks = baselines.grasp(model, batches, 0.5, loss_fn=of_weights(a))
    assert set(masks.flat().nonzero().flatten().tolist()) == set(score.topk(3).indices.tolist())
    uniform = baselines.grasp(model, batches, 0.5, loss_fn=of_weights(a), allocation="uniform")
    assert [int(uniform[name].sum()) for name in uniform] == [2, 1]
    # Of all choices of three, removing the kept ones would reduce the gradient's norm fastest.
    slopes = {}
    for three in itertools.combinations(range(6), 3):
        step = torch.zeros_like(w)
        step[list(three)] = -w[list(three)]
        slopes[three] = float((a @ (w + step)).square().sum() - (a @ (w - step)).square().sum())
    assert min(slopes, key=slopes.get) == tuple(masks.flat().nonzero().flatten().tolist())


def test_grasp_through_attention():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.out = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x):
            q = self.q(x).unsqueeze(1)
            return self.out(nn.functional.scaled_dot_product_attention(q, q, q).squeeze(1).mean(1))

    batches = [(torch.randn(4, 5, 8), torch.randint(4, (4,))) for _ in range(2)]
    assert baselines.grasp(Net(), batches, 0.75).kept == 24


def test_grasp_of_a_compiled_model(mlp, vectors):
    compiled = torch.compile(mlp, backend="aot_eager")
    assert baselines.grasp(compiled, vectors, 0.75) == baselines.grasp(mlp, vectors, 0.75)


def test_the_model_is_not_changed(convnet, images):
    for parameter in convnet.parameters():
        parameter.requires_grad_(False)
    snapshot = Snapshot(convnet)
    baselines.force(convnet, images, 0.8, rounds=3)
    baselines.grasp(convnet, images, 0.8, max_batches=2)
    baselines.synflow(convnet, 0.8, example=images[0], rounds=3)
    snapshot.check()


def test_bad_input_is_named(mlp, vectors):
    for call, words in (
        (lambda: baselines.force(mlp, vectors, 0.5, rounds=0), "rounds: wanted ≥ 1, got 0"),
        (lambda: baselines.force(mlp, vectors, 0.5, batches_per_round=0), "batches_per_round: wanted ≥ 1"),
        (lambda: baselines.force(mlp, iter(vectors), 0.5, rounds=11), r"wanted 11 batches \(rounds × batches_per_r"),
        (lambda: baselines.synflow(mlp, 0.5, example=vectors[0], rounds=0), "rounds: wanted ≥ 1, got 0"),
        (lambda: baselines.synflow(mlp, 1.5, example=vectors[0]), "sparsity: wanted"),
        (lambda: baselines.grasp(mlp, [], 0.5), "loader: wanted batches"),
        (lambda: baselines.grasp(mlp, vectors, 0.5, max_batches=0), "max_batches: wanted ≥ 1 or None"),
        (lambda: baselines.grasp(mlp, vectors, 0.5, allocation="lamp"), "allocation: wanted one of global, uniform"),
        (lambda: baselines.grasp(mlp, vectors, 0.5, loss_fn=lambda net, b: net(b[0]).sum() * 0), "loss_fn: wanted"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match="batch: wanted a tensor"):
        baselines.synflow(mlp, 0.5, example=3)
    dead = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    nn.init.zeros_(dead[0].weight), nn.init.zeros_(dead[1].weight)
    with pytest.raises(ValueError, match="example: wanted outputs that depend on the prunable weights"):
        baselines.synflow(dead, 0.5, example=torch.ones(1, 4))

"""Layer-wise least squares: against brute force, what it recovers, the guard, what errors leave."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sfpk_kernels import MaskSet, repair
from sfpk_kernels.baselines import magnitude
from sfpk_kernels.modeling import layers, state
from sfpk_kernels.retraining import layer_moments, layer_repair
from sfpk_kernels.retraining.layer_moments import stages
from sfpk_kernels.retraining.least_squares import Moments
from tests.interruptions import every_moment
from tests.snapshot import Snapshot

EXACT = {"guard": None, "damping": 1e-12, "iterations": 400}


def moments(x, y, parts=3):
    found = Moments()
    for a, b in zip(x.chunk(parts, 1), y.chunk(parts, 1), strict=True):
        found.add(a, b)
    return found


@pytest.mark.parametrize("centred", [False, True])
def test_the_solution_is_that_of_lstsq(centred):
    """Row by row, each with the columns it keeps, a column of ones for the bias; rows with nothing kept are 0."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, y = draw(2, 90, 12) @ draw(2, 12, 12) + 3, draw(2, 90, 5) - 1
    keep = draw(2, 5, 12) > 0.2
    keep[0, 1] = False
    problem = moments(x, y).problem(centred)
    found = problem.solve(torch.zeros(2, 5, 12, dtype=torch.float64), keep, 1e-14, 200)
    bias = problem.bias(found)
    squares = torch.zeros(())
    for g in range(2):
        for r in range(5):
            columns = x[g][:, keep[g, r]]
            if centred:
                columns = torch.cat([columns, torch.ones(90, 1, dtype=torch.float64)], 1)
            wanted = torch.linalg.lstsq(columns, y[g][:, r : r + 1]).solution[:, 0]
            squares = squares + (columns @ wanted - y[g][:, r]).square().sum()
            kept = int(keep[g, r].sum())
            torch.testing.assert_close(found[g, r][keep[g, r]], wanted[:kept], rtol=1e-6, atol=1e-8)
            assert not found[g, r][~keep[g, r]].any()
            if centred:
                torch.testing.assert_close(bias[g, r], wanted[-1], rtol=1e-6, atol=1e-8)
    variance = (y - y.mean(1, keepdim=True) if centred else y).square().sum()
    assert problem.error(found, bias if centred else None) == pytest.approx(float(squares / variance), rel=1e-6)


def test_damping_is_a_ridge_towards_the_start():
    generator = torch.Generator().manual_seed(1)
    x, y, start = (torch.randn(1, *s, generator=generator, dtype=torch.float64) for s in ((50, 6), (50, 2), (2, 6)))
    keep = torch.tensor([[[1, 1, 0, 1, 0, 1], [0, 1, 1, 1, 1, 1]]]).bool()
    found = moments(x, y).problem(False).solve(start * keep, keep, 0.5, 50)
    gram = x[0].T @ x[0]
    ridge = 0.5 * gram.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    for r in range(2):
        k = keep[0, r]
        wanted = torch.linalg.solve((gram + ridge)[k][:, k], x[0].T[k] @ y[0][:, r] + ridge[0, 0] * start[0, r][k])
        torch.testing.assert_close(found[0, r][k], wanted, rtol=1e-8, atol=1e-10)


def test_fp32_in_thirty_iterations_has_the_error_of_the_solution():
    """Correlated inputs with a large mean, of a very different scale."""
    generator = torch.Generator().manual_seed(2)
    x = 1e3 * (torch.randn(1, 600, 40, generator=generator) @ torch.randn(40, 40, generator=generator) / 6 + 2)
    y = x @ torch.randn(1, 40, 8, generator=generator)
    keep = torch.rand(1, 8, 40, generator=generator) < 0.5
    problem = moments(x.double(), y.double()).problem(True)
    start = torch.zeros(1, 8, 40)
    exact = problem.solve(start.double(), keep, 0.01, 400)
    found = moments(x, y).problem(True).solve(start, keep, 0.01, 30)
    assert found.dtype == torch.float32
    assert problem.error(found, problem.bias(found)) <= 1.01 * problem.error(exact, problem.bias(exact))


LAYERS = [
    (lambda: nn.Linear(6, 4), (6,)),
    (lambda: nn.Linear(6, 4, bias=False), (5, 6)),
    (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (4, 7, 6)),
    (lambda: nn.Conv2d(4, 4, (3, 1), padding=(1, 0), padding_mode="reflect", bias=False), (4, 5, 6)),
    (lambda: nn.Conv2d(4, 8, 3, dilation=2, groups=2), (4, 6, 7)),
]


@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_what_the_kept_weights_can_represent_is_recovered(make, shape):
    """Two inputs that are always equal: one of their weights is removed, the other one takes over for both."""
    layer = make().double()
    channels = layer.weight.shape[1]
    keep = torch.ones_like(layer.weight, dtype=torch.bool)
    keep[:, 1] = False
    axis = 1 if isinstance(layer, nn.Conv2d) else -1
    batches = []
    for _ in range(4):
        x = torch.randn(8, *shape, dtype=torch.float64)
        apart = x.unflatten(axis, (-1, channels)).movedim(axis if axis == -1 else 2, 0)  # a view
        apart[1] = apart[0]
        batches.append(x)
    dense, mask = copy.deepcopy(layer), MaskSet({"weight": keep})
    result = repair(layer, mask, batches, **EXACT)
    assert MaskSet.from_model(layer) == mask
    expected = dense.weight.detach().clone()
    expected[:, 0] += expected[:, 1]
    torch.testing.assert_close(layer.weight.detach(), expected * keep, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(layer(batches[0]), dense(batches[0]), rtol=1e-5, atol=1e-6)
    (only,) = result.layers
    assert only.error_after < 1e-9 < 0.01 < only.error_before
    assert only.kept
    assert math.isnan(only.loss)


def test_layers_go_in_order_towards_the_dense_outputs(mlp, vectors):
    """Written out for two layers: the second one with the inputs that the first one, repaired, gives."""
    model = mlp.double()
    dense, batches = copy.deepcopy(model), [x.double() for x, _ in vectors]
    mask = magnitude(model, 0.5)
    result = repair(model, mask, batches, dense=None, evaluate=batches[:1], **EXACT)
    linear = [m for m in dense if isinstance(m, nn.Linear)]
    repaired = [m for m in model if isinstance(m, nn.Linear)]
    x = wanted = torch.cat(batches)
    assert [layer.name for layer in result.layers] == list(mask)
    for ours, theirs, name in zip(repaired, linear, mask, strict=True):
        wanted = theirs(wanted)
        for r, keep in enumerate(mask[name]):
            columns = torch.cat([x[:, keep], torch.ones(len(x), 1, dtype=x.dtype)], 1)
            best = columns @ torch.linalg.lstsq(columns, wanted[:, r : r + 1]).solution[:, 0]
            torch.testing.assert_close(ours(x)[:, r], best, rtol=1e-4, atol=1e-6)
        x, wanted = torch.tanh(ours(x)), torch.tanh(wanted)
    assert all(layer.error_after < layer.error_before for layer in result.layers)


def test_it_helps_a_network_and_says_how_much(convnet, images):
    dense, mask = copy.deepcopy(convnet), magnitude(convnet, 0.7)
    modes = [module.training for module in convnet.modules()]
    identities = [id(parameter) for parameter in convnet.parameters()]
    statistics = convnet[1].running_mean.clone()
    result = repair(convnet, mask, images, guard="output")
    assert result.loss_after < 0.9 * result.loss_before
    assert MaskSet.from_model(convnet) == mask
    assert [module.training for module in convnet.modules()] == modes
    assert [id(parameter) for parameter in convnet.parameters()] == identities
    assert [layer.name for layer in result.layers] == ["0.weight", "4.weight", "8.weight"]
    assert result.layers[-1].loss == result.loss_after
    assert "3 layers" in repr(result)
    assert not torch.equal(convnet[1].running_mean, statistics)  # recalibrated
    again = copy.deepcopy(dense)
    assert repair(again, mask, iter(images), guard="output", dense=dense).layers == result.layers
    for ours, theirs in zip(convnet.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    masked = mask.apply_(copy.deepcopy(dense))  # masked before: the dense model is given
    assert repair(masked, mask, images, guard="output", dense=dense).layers == result.layers


def test_a_run_repeats_under_its_seed(mlp, vectors):
    """The order of a shuffled loader decides what is held out."""
    mask, samples = magnitude(mlp, 0.5), [pair for x, y in vectors for pair in zip(x, y, strict=True)]
    loader = torch.utils.data.DataLoader(samples, 16, shuffle=True)

    def outcome(seed):
        torch.rand(1)
        return repair(copy.deepcopy(mlp), mask, loader, seed=seed).layers

    assert outcome(1) == outcome(1) != outcome(2)


def test_modules_of_transformers_that_have_a_path_of_their_own():
    """A fused forward pass calls no layers; with hooks it is not taken."""
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    mask = magnitude(model, 0.6)
    result = repair(model, mask, [torch.randn(6, 5, 8) for _ in range(4)], guard="output")
    assert [layer.name for layer in result.layers] == ["linear1.weight", "linear2.weight"]
    assert result.skipped["self_attn.out_proj.weight"] == "not called"
    assert MaskSet.from_model(model) == mask


def test_wrapped_models(mlp, vectors):
    mask, plain = magnitude(mlp, 0.5), copy.deepcopy(mlp)
    wrapped, dense = nn.DataParallel(mlp), nn.DataParallel(copy.deepcopy(mlp))
    assert repair(wrapped, mask, vectors, dense=dense).layers == repair(plain, mask, vectors).layers
    assert MaskSet.from_model(mlp) == mask


def test_the_guard_refuses_what_harms(mlp, vectors):
    """A loss that is least where the masked weights are: every change raises it."""
    mask = magnitude(mlp, 0.5)
    masked = mask.apply_(copy.deepcopy(mlp))
    expected = copy.deepcopy(masked.state_dict())

    def loss_fn(model, batch):
        return (model(batch[0]) - masked(batch[0])).square().mean()

    twin = copy.deepcopy(mlp)
    result = repair(mlp, mask, vectors, loss_fn=loss_fn)
    assert result.rejected == list(mask)
    assert result.loss_before == result.loss_after == 0
    assert all(layer.error_before == layer.error_after > 0 for layer in result.layers)
    assert all(torch.equal(value, expected[name]) for name, value in mlp.state_dict().items())
    free = repair(twin, mask, vectors, guard=None)
    assert free.rejected == []
    assert any(not torch.equal(value, expected[name]) for name, value in twin.state_dict().items())


def test_the_guard_goes_a_part_of_the_way():
    """The loss is least at half of the way."""
    layer = nn.Linear(6, 3).double()
    mask, batches = MaskSet({"weight": torch.arange(18).view(3, 6) % 2 == 0}), [torch.randn(30, 6).double()] * 3
    whole, masked = copy.deepcopy(layer), mask.apply_(copy.deepcopy(layer))
    repair(whole, mask, batches, guard=None)
    middle = (whole.weight + masked.weight).detach() / 2

    def loss_fn(model, batch):
        model(batch)
        return (model.weight - middle).square().sum()

    result = repair(layer, mask, batches, loss_fn=loss_fn)
    assert [found.step for found in result.layers] == [0.5]
    torch.testing.assert_close(layer.weight.detach(), middle)


class Attention(nn.Module):
    """Query, key and value of one input, one weight used twice, one in no layer, one that is never called."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 6) for _ in range(3))
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.unused, self.embedding = nn.Linear(2, 2), nn.Embedding(4, 6)

    def forward(self, x, attention_mask):
        h = self.embedding(x)
        h = F.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h), attention_mask[:, None].bool())
        return self.second(self.first(h).relu())


def test_shared_inputs_tied_weights_padding_and_what_is_no_layer():
    model = Attention()
    names = ["q.weight", "k.weight", "v.weight", "first.weight", "unused.weight", "embedding.weight"]
    mask = MaskSet({name: torch.rand(model.get_parameter(name).shape) < 0.6 for name in names})
    batches = [{"x": torch.randint(4, (8, 5)), "attention_mask": (torch.arange(5) < 3).repeat(8, 1)} for _ in range(4)]
    found, _ = layer_moments.masked_layers(model, mask)
    order = stages(model, found, batches[0], lambda model, batch: model(**batch))
    assert [[layer.tensor.name for layer in stage] for stage in order] == [names[:3], names[3:4]]
    seen = {}
    for layer in order[0]:
        found = layer_moments.moments_of(
            [layer], model, copy.deepcopy(model), batches, torch.device("cpu"), lambda model, batch: model(**batch)
        )
        seen |= {each.tensor.name: moments.samples for each, moments in found.items()}
    assert seen == dict.fromkeys(names[:3], 4 * 8 * 3)
    biases = model.first.bias.clone(), model.second.bias.clone()
    result = repair(model, mask, batches, guard="output")
    assert result.loss_after < result.loss_before
    assert [layer.name for layer in result.layers] == names[:4]
    assert result.skipped == {
        "unused.weight": "not called", "embedding.weight": "Embedding: no weight of Linear or Conv2d layers alone",
    }  # fmt: skip
    assert torch.equal(model.first.bias, biases[0])  # one weight, two biases
    assert torch.equal(model.second.bias, biases[1])
    assert all(not model.get_parameter(name)[~mask[name]].any() for name in names)


def test_an_error_leaves_the_model_as_it_was(convnet, images):
    mask, seen = magnitude(convnet, 0.5), Snapshot(convnet)
    bad = [*images[:2], (images[2][0] * float("nan"), images[2][1]), *images[3:]]
    with pytest.raises(FloatingPointError, match="loader: wanted finite inputs and outputs of 0.weight"):
        repair(convnet, mask, bad)
    seen.check()
    with pytest.raises(FloatingPointError, match="wanted a finite loss on the batches it is measured on"):
        repair(convnet, mask, images, evaluate=bad)
    seen.check()
    calls = []

    def loss_fn(model, batch):
        calls.append(1)
        if len(calls) == 40:
            raise KeyError("of its own")
        return F.cross_entropy(model(batch[0]), batch[1])

    with pytest.raises(KeyError, match="of its own"):
        repair(convnet, mask, images, loss_fn=loss_fn)
    seen.check()


def test_an_interruption_anywhere_leaves_the_models_as_they_were(mlp, vectors):
    mask, dense, stopped = magnitude(mlp, 0.5), copy.deepcopy(mlp), 0
    seen = Snapshot(mlp), Snapshot(dense)

    def work():
        repair(mlp, mask, vectors[:2], dense=dense, iterations=1)

    files = [repair.__code__.co_filename, *(m.__file__ for m in (layer_repair, layer_moments, layers, state))]
    for _ in every_moment(work, files, step=11):
        stopped += 1
        for snapshot in seen:
            snapshot.check()
        for module in (*mlp.modules(), *dense.modules()):
            assert not module._forward_pre_hooks
            assert not module._forward_hooks
        assert torch.is_grad_enabled()
    assert stopped > 20
    assert MaskSet.from_model(mlp) == mask
    seen[1].check()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"guard": "accuracy"}, ValueError, "guard: wanted 'loss', 'output' or None, got 'accuracy'"),
        ({"damping": 0}, ValueError, "damping: wanted a finite number > 0"),
        ({"iterations": 0}, ValueError, "iterations: wanted ≥ 1"),
        ({"max_batches": 0}, ValueError, "max_batches: wanted ≥ 1 or None"),
        ({"max_batches": 1}, ValueError, "loader: wanted at least one batch to calibrate on, and one more .* got 1"),
        ({"evaluate": []}, ValueError, "evaluate: wanted batches or None, got an empty iterable"),
        ({"dense": 3}, TypeError, "dense: wanted the dense model, an nn.Module, got int"),
        ({"dense": nn.Linear(2, 2)}, ValueError, "wanted the model these masks were made for"),
        ({"loss_fn": 3}, TypeError, "loss_fn: wanted a function"),
    ],
)
def test_bad_arguments(mlp, vectors, options, error, words):
    seen, mask = Snapshot(mlp), magnitude(mlp, 0.5)
    with pytest.raises(error, match=words):
        repair(mlp, mask, vectors, **options)
    seen.check()


def test_models_and_masks_that_do_not_belong_together(mlp, vectors):
    mask = magnitude(mlp, 0.5)
    with pytest.raises(TypeError, match=r"mask: wanted a MaskSet, got list: the call is repair\(model, mask, loader"):
        repair(mlp, vectors, mask)
    with pytest.raises(ValueError, match="dense: wanted a model with weights of its own"):
        repair(mlp, mask, vectors, dense=mlp)
    with pytest.raises(ValueError, match="model: wanted the dense model, .* pass it before masking"):
        repair(mask.apply_(mlp), mask, vectors)
    lonely = nn.Sequential(nn.Embedding(4, 3), nn.Flatten())
    alone = MaskSet({"0.weight": torch.rand(4, 3) < 0.5})
    with pytest.raises(ValueError, match="mask: wanted masks of Linear or Conv2d layers that are called"):
        repair(lonely, alone, [torch.randint(4, (5, 2))] * 2, guard="output")

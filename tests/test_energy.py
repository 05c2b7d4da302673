"""Energies: vmap and sequential agree, the gradient is the derivative, unusual models and losses."""

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sfpk_kernels import Coordinates, default_loss
from sfpk_kernels.modeling.state import guarded
from sfpk_kernels.search.energy import Choice, ParticleEnergy


def energies(model, batches, keep=None, *, bn="batch", dropout=False, loss_fn=default_loss, seed=None, **options):
    coordinates = Coordinates(model)
    theta = coordinates.flatten(model)
    if keep is None:
        generator = torch.Generator().manual_seed(1)
        keep = torch.rand(len(batches), coordinates.d, generator=generator) > 0.3
    energy = ParticleEnergy(model, loss_fn, coordinates, theta, **options)
    if seed is not None:
        torch.manual_seed(seed)
    with guarded(model, bn=bn, training=dropout):
        losses, grads = energy(keep, batches)
    return losses, grads, energy


@pytest.mark.parametrize("chunk_size", [None, 1, 3])
@pytest.mark.parametrize(("bn", "kind"), [("batch", "convnet"), ("running", "convnet"), ("batch", "mlp")])
def test_vmap_and_sequential_agree(request, vectors, images, bn, kind, chunk_size):
    model, batches = request.getfixturevalue(kind), images if kind == "convnet" else vectors
    batched = energies(model, batches, bn=bn, mode="vmap", chunk_size=chunk_size)
    single = energies(model, batches, bn=bn, mode="sequential")
    torch.testing.assert_close(batched[0], single[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(batched[1], single[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["vmap", "sequential"])
def test_batchnorm_uses_batch_statistics_and_leaves_its_own(convnet, images, mode):
    before = {name: value.clone() for name, value in convnet.state_dict().items()}
    batch, running = (energies(convnet, images, bn=bn, mode=mode)[0] for bn in ("batch", "running"))
    assert not torch.allclose(batch, running)
    for name, value in convnet.state_dict().items():
        assert torch.equal(value, before[name]), name
    # The batch statistics are those of the particle's own batch: train mode on a copy says the same.
    dense = torch.ones(1, Coordinates(convnet).d, dtype=torch.bool)
    loss = energies(convnet, images[:1], dense, mode=mode)[0]
    for module in convnet:
        module.training = isinstance(module, nn.BatchNorm2d)
    assert float(loss) == pytest.approx(default_loss(convnet, images[0]).item(), rel=1e-5)


@pytest.mark.parametrize("mode", ["vmap", "sequential"])
def test_mask_gradient_by_finite_differences(mlp, mode):
    """Polarizer off: θ ⊙ ∂L/∂W is the derivative of L(m ⊙ θ) by m."""
    model = mlp.double()
    coordinates = Coordinates(model)
    theta = coordinates.flatten(model)
    batch = (torch.randn(16, 8, dtype=torch.float64), torch.randint(4, (16,)))
    m = torch.rand(1, coordinates.d, dtype=torch.float64) + 0.5
    _, grads, _ = energies(model, [batch], m, mode=mode)
    gradient = (theta * grads[0])[:40]
    h = 1e-6
    plus, minus = m.repeat(40, 1), m.repeat(40, 1)
    index = torch.arange(40)
    plus[index, index] += h
    minus[index, index] -= h
    higher, _, _ = energies(model, [batch] * 40, plus, mode="sequential")
    lower, _, _ = energies(model, [batch] * 40, minus, mode="sequential")
    torch.testing.assert_close(gradient, (higher - lower) / (2 * h), rtol=1e-6, atol=1e-9)


def test_removed_weights_still_receive_a_gradient(mlp, vectors):
    keep = torch.zeros(1, Coordinates(mlp).d, dtype=torch.bool)
    keep[:, :48] = True
    _, grads, _ = energies(mlp, vectors[:1], keep)
    assert grads[:, 48:].abs().sum() > 0


def test_dropout_is_off_by_default_and_seeded_on_request(convnet, images):
    first, second = (energies(convnet, images, mode="sequential")[0] for _ in range(2))
    assert torch.equal(first, second)
    for mode in ("vmap", "sequential"):
        a, b, c = (energies(convnet, images, mode=mode, dropout=True, seed=s)[0] for s in (1, 1, 2))
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
        assert not torch.equal(a, first)


@pytest.mark.parametrize("mode", ["vmap", "sequential"])
def test_dropout_differs_between_particles(convnet, images, mode):
    dense = torch.ones(4, Coordinates(convnet).d, dtype=torch.bool)
    losses = energies(convnet, images[:1] * 4, dense, mode=mode, dropout=True)[0]
    assert len(set(losses.tolist())) == 4


class DataDependent(nn.Module):
    """vmap cannot follow a Python branch on values."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x):
        y = self.linear(x)
        return y if y.sum() > 0 else -y


def test_a_model_vmap_cannot_run_goes_one_by_one_and_says_why(vectors, caplog):
    model = DataDependent()
    losses, grads, energy = energies(model, vectors, mode="auto", chunk_size=4)
    grads = grads.clone()
    assert energy.mode == "sequential"
    assert "vmap failed" in energy.choice.reason
    assert "data-dependent control flow" in energy.choice.reason or "RuntimeError" in energy.choice.reason
    # Batches that look alike in the trial may differ later: one log line then.
    energy.choice = Choice("vmap", "as the trial might have found")
    with caplog.at_level(logging.WARNING, logger="sfpk_kernels"), guarded(model, bn="batch", training=False):
        for _ in range(2):
            energy(torch.ones(10, energy.problem.theta.numel(), dtype=torch.bool), vectors)
    assert energy.mode == "sequential"
    assert len([r for r in caplog.records if "vmap failed" in r.getMessage()]) == 1
    expected = energies(model, vectors, mode="sequential")
    assert torch.equal(losses, expected[0])
    assert torch.equal(grads, expected[1])
    with pytest.raises(RuntimeError, match="energy_mode='vmap' cannot run this model"):
        energies(model, vectors, mode="vmap")


def test_a_vmap_pass_that_fails_leaves_nothing_on_the_model(vectors):
    class Keeps(DataDependent):
        def forward(self, x):
            self.last = self.linear(x)
            return super().forward(x)

    model = Keeps()
    with pytest.raises(RuntimeError, match="cannot run this model"):
        energies(model, vectors, mode="vmap")
    assert not hasattr(model, "last")


def test_timed_takes_what_the_trial_finds_fastest(mlp, vectors):
    choice = energies(mlp, vectors, mode="timed")[2].choice
    assert set(choice.seconds) == {"sequential", "vmap"}
    assert choice.mode in choice.seconds
    assert "per particle sequential" in choice.reason
    assert all(seconds > 0 for seconds in choice.seconds.values())
    slower = max(choice.seconds.values())
    assert choice.seconds[choice.mode] <= slower


def test_timed_does_not_time_where_runs_must_repeat(mlp, vectors):
    torch.use_deterministic_algorithms(True)
    try:
        choice = energies(mlp, vectors, mode="timed")[2].choice
    finally:
        torch.use_deterministic_algorithms(False)
    assert choice.mode == "sequential"
    assert "use_deterministic_algorithms" in choice.reason


def test_timed_tries_vmap_only_where_it_fits(mlp, vectors):
    coordinates = Coordinates(mlp)
    energy = ParticleEnergy(mlp, default_loss, coordinates, coordinates.flatten(mlp), mode="timed")
    with guarded(mlp, bn="batch", training=False):
        choice = energy.choose(vectors[0], 10, trial_bytes=1000)
    assert set(choice.seconds) == {"sequential"}
    assert "1 kB are free" in choice.reason


def test_batches_of_different_size(mlp, vectors):
    ragged = [*vectors[:3], (vectors[3][0][:5], vectors[3][1][:5])]
    coordinates = Coordinates(mlp)
    energy = ParticleEnergy(mlp, default_loss, coordinates, coordinates.flatten(mlp))
    energy.choice = Choice("vmap", "as the trial might have found")
    generator = torch.Generator().manual_seed(1)
    keep = torch.rand(4, coordinates.d, generator=generator) > 0.3
    with guarded(mlp, bn="batch", training=False):
        losses, grads = energy(keep, ragged)
    assert energy.mode == "vmap", "one ragged chunk does not switch vmap off"
    expected = energies(mlp, ragged, mode="sequential")
    torch.testing.assert_close(losses, expected[0])
    torch.testing.assert_close(grads, expected[1])
    with pytest.raises(RuntimeError, match="batches differ"):
        energies(mlp, ragged, mode="vmap")


class WithLoss(nn.Module):
    """Hugging Face style: dict batch in, output with .loss out."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, inputs, labels=None):
        logits = self.linear(inputs)
        output = {"logits": logits}
        if labels is not None:
            output["loss"] = F.cross_entropy(logits, labels)
        return output


@pytest.mark.parametrize("mode", ["vmap", "sequential"])
def test_dict_batches(vectors, mode):
    model = WithLoss()
    batches = [{"inputs": x, "labels": y} for x, y in vectors]
    losses, grads, _ = energies(model, batches, mode=mode)
    expected = energies(model, vectors, mode=mode, loss_fn=lambda net, b: F.cross_entropy(net.linear(b[0]), b[1]))
    torch.testing.assert_close(losses, expected[0])
    torch.testing.assert_close(grads, expected[1])


@pytest.mark.parametrize("mode", ["vmap", "sequential"])
def test_tied_weights_and_half_precision_models(mode):
    tied = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Tanh(), nn.Linear(8, 8, bias=False))
    tied[2].weight = tied[0].weight
    batches = [(torch.randn(4, 8), torch.randint(8, (4,))) for _ in range(2)]
    keep = torch.ones(2, 64, dtype=torch.bool)
    _, grads, _ = energies(tied, batches, keep, mode=mode)
    default_loss(tied, batches[0]).backward()
    torch.testing.assert_close(grads[0], tied[0].weight.grad.flatten())

    # Tied, but not prunable: a head that shares an embedding.
    model = nn.Sequential(nn.Embedding(8, 6), nn.Linear(6, 6), nn.Linear(6, 8, bias=False))
    model[2].weight = model[0].weight
    tokens = [(torch.randint(8, (4,)), torch.randint(8, (4,))) for _ in range(2)]
    _, grads, _ = energies(model, tokens, torch.ones(2, 36, dtype=torch.bool), mode=mode)
    default_loss(model, tokens[0]).backward()
    torch.testing.assert_close(grads[0], model[1].weight.grad.flatten())

    half = nn.Linear(8, 4).bfloat16()
    _, grads, _ = energies(half, [(torch.randn(4, 8).bfloat16(), torch.randint(4, (4,)))], mode=mode)
    assert grads.dtype == torch.float32
    assert grads.abs().sum() > 0


def test_checkpointed_layers_see_the_masked_weights_again_in_backward(vectors):
    class Checkpointed(nn.Module):
        def __init__(self, checkpoints):
            super().__init__()
            self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)
            self.middle = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
            self.checkpoints = checkpoints

        def forward(self, x):
            h = self.first(x)
            h = checkpoint(self.middle, h, use_reentrant=False) if self.checkpoints else self.middle(h)
            return self.last(h)

    plain, checkpointed = Checkpointed(False), Checkpointed(True)
    checkpointed.load_state_dict(plain.state_dict())
    expected, actual = (energies(model, vectors, mode="sequential") for model in (plain, checkpointed))
    torch.testing.assert_close(actual[0], expected[0])
    torch.testing.assert_close(actual[1], expected[1])


def test_an_unused_layer_gets_a_zero_gradient(mlp, vectors):
    _, grads, _ = energies(mlp, vectors, mode="sequential", loss_fn=lambda net, b: net[0](b[0]).square().mean())
    assert grads[:, :96].abs().sum() > 0
    assert torch.equal(grads[:, 96:], torch.zeros(10, 48))


@pytest.mark.parametrize("mode", ["auto", "sequential"])
@pytest.mark.parametrize(
    ("loss_fn", "error", "words"),
    [
        (lambda m, b: m(b[0]), ValueError, r"loss_fn: wanted a scalar tensor, got shape \(16, 4\)"),
        (lambda m, b: 1.0, TypeError, "loss_fn: wanted a scalar tensor, got float"),
        (lambda m, b: torch.tensor(1.0), RuntimeError, "loss that depends on the prunable weights"),
    ],
)
def test_losses_that_are_no_scalar_function_of_the_weights(mlp, vectors, mode, loss_fn, error, words):
    with pytest.raises(error, match=words):
        energies(mlp, vectors, mode=mode, loss_fn=loss_fn)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (torch.randn(4, 8), "got Tensor"),
        ((torch.randn(4, 8),), "got tuple of Tensor"),
        ([1, 2, 3], "got list of int, int, int"),
        ("text", "got str"),
        ({"input": torch.randn(4, 8)}, r"output of Tensor without one"),
    ],
)
def test_a_batch_of_the_wrong_kind_is_named(mlp, batch, words):
    with pytest.raises(TypeError, match=f"loss_fn: the default loss .*{words}"):
        default_loss(mlp, batch)


def test_a_model_without_logits_is_named():
    with pytest.raises(TypeError, match="wants the model to return logits, got dict"):
        default_loss(WithLoss(), (torch.randn(2, 8), torch.randint(4, (2,))))


def test_the_loss_may_be_a_module_that_holds_the_model(mlp, vectors):
    class Criterion(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, model, batch):
            return F.cross_entropy(self.inner(batch[0]), batch[1])

    losses, grads, _ = energies(mlp, vectors, mode="sequential", loss_fn=Criterion(mlp))
    expected = energies(mlp, vectors, mode="sequential")
    assert torch.equal(losses, expected[0])
    assert torch.equal(grads, expected[1])

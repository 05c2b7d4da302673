"""The kinds of models people prune: every way of computing energies agrees, in every precision and batch split."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks import models
from sfpk_kernels import Coordinates, Execution, default_loss, prune
from sfpk_kernels.modeling.state import guarded
from sfpk_kernels.search.energy import ParticleEnergy
from sfpk_kernels.search.energy._scale import LossScale

from .settings import population
from .wrappers import WRAPPERS

N = 3

KINDS = {
    "mlp": (lambda: models.mlp((64, 24, 10)), models.images(8, channels=1)),
    "dropout": (lambda: models.mlp((64, 24, 12, 10), dropout=0.2), models.images(8, channels=1)),
    "resnet": (lambda: models.resnet(8, 4), models.images(8)),
    "wide-resnet": (lambda: models.resnet(8, 12), models.images(8)),
    "vgg": (lambda: models.vgg((6, 0, 8, 8, 0)), models.images(8)),
    "mobilenet": (lambda: models.mobilenet(0.0625), models.images(32)),
    "vit": (lambda: models.Vit(16, 2, 2, image=16, patch=4), models.images(16)),
    "gpt": (lambda: models.Gpt(16, 2, 2, vocabulary=31, tokens=9), models.texts(9, 31)),
    "rnn": (models.Recurrent, lambda batch: (torch.randn(batch, 5, 8), torch.randint(10, (batch,)))),
}


def energies(model, batches, mode, *, bn="batch", loss_fn=default_loss, **options):
    coordinates = Coordinates(model)
    energy = ParticleEnergy(model, loss_fn, coordinates, coordinates.flatten(model), mode=mode, **options)
    keep = torch.rand(len(batches), coordinates.d, generator=torch.Generator().manual_seed(1)) > 0.3
    with guarded(model, bn=bn, training=False):
        losses, grads = energy(keep, batches)
    return losses, grads, energy


def task(kind, samples=6):
    build, make_batch = KINDS[kind]
    torch.manual_seed(0)
    return build(), [make_batch(samples) for _ in range(N)]


def close(actual, expected, share):
    """Gradients as wholes: the relative norm of their difference."""
    assert ((actual[1] - expected[1]).norm(dim=1) <= share * expected[1].norm(dim=1)).all()
    torch.testing.assert_close(actual[0], expected[0], rtol=share, atol=1e-6)


def by_hand(model, batches, **options):
    """Gradients by plain backward on a copy with masked weights."""
    import copy

    coordinates = Coordinates(model)
    keep = torch.rand(len(batches), coordinates.d, generator=torch.Generator().manual_seed(1)) > 0.3
    losses, grads = [], []
    for mask, batch in zip(keep, batches, strict=True):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for p, part in zip(coordinates.parameters(twin), coordinates.split(mask), strict=True):
                p.mul_(part)
        with guarded(twin, bn="batch", training=False):
            loss = default_loss(twin, batch)
            loss.backward()
        losses.append(loss.detach().double())
        grads.append(torch.cat([p.grad.flatten() for p in coordinates.parameters(twin)]))
    return torch.stack(losses), torch.stack(grads)


@pytest.mark.parametrize("kind", KINDS)
def test_one_by_one_is_plain_backward(kind):
    model, batches = task(kind)
    close(energies(model, batches, "sequential"), by_hand(model, batches), 1e-5)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "rnn"])
def test_vmap_agrees(kind):
    model, batches = task(kind)
    close(energies(model, batches, "vmap"), energies(model, batches, "sequential"), 1e-4)


def test_an_rnn_goes_one_by_one_and_says_why():
    model, batches = task("rnn")
    _, _, energy = energies(model, batches, "timed")
    assert energy.mode == "sequential"
    assert "LSTM keeps a list of its weights" in energy.choice.reason
    with pytest.raises(RuntimeError, match="energy_mode='vmap' cannot run this model: LSTM"):
        energies(model, batches, "vmap")


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("vgg", "sequential"), *((kind, mode) for kind in ("mlp", "vit", "gpt") for mode in ("sequential", "vmap"))],
)
@pytest.mark.parametrize(("precision", "share"), [("bf16", 0.15), ("fp16", 0.02)])
def test_autocast(kind, mode, precision, share):
    """Close to fp32, not equal to it: the model did run in two bytes, the gradients are kept in fp32."""
    model, batches = task(kind)
    exact = energies(model, batches, "sequential")
    rough = energies(model, batches, mode, precision=precision)
    assert rough[1].dtype == torch.float32
    close(rough, exact, share)
    assert not torch.allclose(rough[1], exact[1], rtol=1e-5, atol=0)


def test_autocast_of_batch_norm_under_vmap_says_why():
    model, batches = task("vgg")
    with pytest.raises(RuntimeError, match="cannot run this model: vmap failed: RuntimeError: expected scalar type"):
        energies(model, batches, "vmap", precision="bf16")
    _, _, energy = energies(model, batches, "timed", precision="bf16")
    assert energy.mode == "sequential"
    assert "expected scalar type" in energy.choice.reason


@pytest.mark.parametrize("mode", ["sequential", "vmap"])
def test_fp16_losses_are_scaled(mode):
    """Gradients below what fp16 holds survive, and a scale that overflows is lowered, not fatal."""
    model, batches = task("mlp")

    def tiny(net, batch):
        return 1e-6 * F.cross_entropy(net(batch[0]).float(), batch[1])

    def huge(net, batch):
        return 1e3 * F.cross_entropy(net(batch[0]).float(), batch[1])

    for loss_fn in (tiny, huge):
        exact = energies(model, batches, "sequential", loss_fn=loss_fn)
        rough = energies(model, batches, mode, precision="fp16", loss_fn=loss_fn)
        close(rough, exact, 0.02)
    assert rough[2].scale.value < 2**16


@pytest.mark.parametrize("mode", ["sequential", "vmap"])
@pytest.mark.parametrize("kind", ["mlp", "vit", "gpt", "resnet"])
@pytest.mark.parametrize("size", [2, 4, 100])
def test_microbatches_give_the_same(kind, mode, size):
    model, batches = task(kind)
    bn = "running"  # the statistics of a micro-batch are not those of the batch
    whole = energies(model, batches, mode, bn=bn)
    close(energies(model, batches, mode, bn=bn, microbatch=size), whole, 1e-5)


def test_microbatches_want_samples(mlp):
    with pytest.raises(ValueError, match="microbatch: wanted a batch whose tensors have samples"):
        energies(mlp, ["text"], "sequential", loss_fn=lambda m, b: m(torch.ones(1, 8)).sum(), microbatch=2)


@pytest.mark.parametrize("microbatch", [None, 3])
def test_checkpointed_blocks(microbatch):
    model, batches = task("gpt")
    expected = energies(model, batches, "sequential")
    for block in model.blocks:
        inner = block.forward
        block.forward = lambda x, inner=inner: checkpoint(inner, x, use_reentrant=False)
    close(energies(model, batches, "sequential", microbatch=microbatch), expected, 1e-5)


def test_mixed_dtypes_and_two_byte_models():
    model, batches = task("mlp")
    model[1].double()
    model[1].register_forward_pre_hook(lambda _, inputs: (inputs[0].double(),))
    model[1].register_forward_hook(lambda _, __, out: out.float())
    close(energies(model, batches, "vmap"), energies(model, batches, "sequential"), 1e-5)
    expected = by_hand(model, batches)
    close(energies(model, batches, "sequential"), (expected[0], expected[1].double()), 1e-5)

    for dtype, share in ((torch.bfloat16, 0.1), (torch.float16, 0.02)):
        half, batches = task("mlp")
        exact = energies(half, batches, "sequential")
        half.to(dtype)
        rough = energies(half, [(x.to(dtype), y) for x, y in batches], "sequential")
        assert rough[1].dtype == torch.float32
        close(rough, exact, share)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sequential", "vmap"])
def test_compiled(mode):
    model, batches = task("mlp")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = energies(model, batches, mode, compiled=True)
    close(compiled, energies(model, batches, mode), 1e-5)
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("mode", ["sequential", "vmap"])
@pytest.mark.parametrize("wrap", WRAPPERS)
def test_wrapped_models_get_the_masks_of_the_model_inside(wrap, mode):
    model, batches = task("gpt")  # with tied weights
    how = {"config": population(0.6, n_particles=2, n_steps=3), "execution": Execution(energy_mode=mode)}
    expected = prune(model, batches, **how).mask
    found = prune(wrap(model), batches, **how).mask
    assert list(found) == list(expected)
    assert found == expected


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "rnn"])
def test_cuda_graph_agrees(kind):
    model, batches = task(kind)
    model.cuda()
    batches = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.cuda, batches)
    coordinates = Coordinates(model)
    keep = torch.rand(N, coordinates.d, device="cuda") > 0.3
    results = []
    for mode in ("sequential", "cudagraph"):
        energy = ParticleEnergy(model, default_loss, coordinates, coordinates.flatten(model), mode=mode)
        with guarded(model, bn="batch", training=False):
            results.append([t.clone() for t in energy(keep, batches)])
    close(results[1], results[0], 1e-3)


def test_cuda_graphs_want_a_gpu(mlp, vectors):
    with pytest.raises(RuntimeError, match="energy_mode='cudagraph' cannot run this model: CUDA graphs need a CUDA"):
        energies(mlp, vectors, "cudagraph")


class Stateless(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 4)
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)

    def forward(self, x):
        return self.layer(x) * self.frozen


def test_particles_elsewhere_than_the_model(vectors, monkeypatch):
    """The path of offload="cpu", with both devices the CPU."""
    model = Stateless()
    expected = energies(model, vectors, "sequential")
    from sfpk_kernels.search.energy import sequential

    class Elsewhere(sequential.OneByOne):
        def __init__(self, problem, scale):
            super().__init__(problem, scale)
            self._crosses = True
            self._staged = torch.empty_like(self._weights)
            self._row = torch.empty_like(problem.theta)

    monkeypatch.setattr("sfpk_kernels.search.energy.OneByOne", Elsewhere)
    actual = energies(model, vectors, "sequential")
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


def test_gradients_that_no_factor_helps_leave_the_loss_scale():
    scale, loss = LossScale(True), torch.tensor(1.0)
    for _ in range(2):
        tries = 1
        while not scale.accepts(loss, torch.tensor([1.0, float("nan")])):
            tries += 1
        assert tries == 17
        assert scale.value == 2.0**16
    assert not scale.accepts(loss, torch.tensor([float("inf")]))
    assert scale.accepts(loss, torch.tensor([1.0]))
    assert scale.value == 2.0**15, "this one the factor had caused"

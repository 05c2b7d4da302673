"""Fine-tuning under a mask: written out by hand, distillation, what errors leave."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sfpk_kernels import MaskSet, finetune_masked
from sfpk_kernels.baselines import magnitude
from sfpk_kernels.modeling import state
from sfpk_kernels.retraining import distillation, finetune, loop, measured
from tests.interruptions import every_moment
from tests.snapshot import Snapshot


def by_hand(model, mask, batches, loss_fn, steps, lr, shares):
    """Adam on a masked model; the losses."""
    mask.apply_(model)
    optimizer, losses = torch.optim.Adam(model.parameters(), lr, betas=(0.9, 0.99)), []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * shares[step]
        optimizer.zero_grad()
        loss = loss_fn(model, batches[step % len(batches)])
        loss.backward()
        losses.append(loss.item())
        for name in mask:
            model.get_parameter(name).grad *= mask[name]
        optimizer.step()
        assert MaskSet.from_model(model) == mask
    return losses


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_it_is_adam_with_a_warm_up(mlp, vectors, decay):
    mask, twin = magnitude(mlp, 0.5), copy.deepcopy(mlp)
    result = finetune_masked(mlp, mask, vectors[:4], steps=10, lr=0.01, warmup=0.2, decay=decay)
    after = [i / 8 for i in range(8)]
    shares = [0.5, 1.0] + [1 - a if decay == "linear" else (1 + math.cos(math.pi * a)) / 2 for a in after]
    losses = by_hand(twin, mask, vectors[:4], lambda m, b: F.cross_entropy(m(b[0]), b[1]), 10, 0.01, shares)
    assert result.losses == pytest.approx(losses, rel=1e-5)
    assert result.steps == 10
    assert result.loss_before is result.loss_after is None
    for ours, theirs in zip(mlp.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_it_lowers_the_loss_and_measures_it(convnet, images):
    mask = magnitude(convnet, 0.8)
    modes = [module.training for module in convnet.modules()]
    identities = [id(parameter) for parameter in convnet.parameters()]
    masked = mask.apply_(copy.deepcopy(convnet))
    with torch.no_grad():
        before = sum(float(F.cross_entropy(masked(x), y)) for x, y in images) / len(images)
    result = finetune_masked(convnet, mask, images, steps=40, lr=0.01, evaluate=iter(images))
    assert result.loss_before == pytest.approx(before, rel=1e-5)
    with torch.no_grad():
        after = sum(float(F.cross_entropy(convnet(x), y)) for x, y in images) / len(images)
    assert result.loss_after == pytest.approx(after, rel=1e-5)
    assert after < before
    assert repr(result).startswith(f"FinetuneResult(40 steps, loss {before:.4f} → {after:.4f}, ")
    assert MaskSet.from_model(convnet) == mask
    assert [module.training for module in convnet.modules()] == modes
    assert [id(parameter) for parameter in convnet.parameters()] == identities
    assert all(parameter.grad is None for parameter in convnet.parameters())


def test_a_run_repeats_under_its_seed(convnet, images):
    """Dropout is drawn under it."""
    mask = magnitude(convnet, 0.5)

    def outcome(seed):
        torch.rand(1)  # nothing is drawn from what the caller left
        model = copy.deepcopy(convnet)
        return finetune_masked(model, mask, images, steps=3, seed=seed).losses

    assert outcome(1) == outcome(1)
    assert outcome(1) != outcome(2)


def distances(output, wanted, temperature):
    probabilities = F.softmax(wanted / temperature, -1)
    log_ratio = probabilities.log() - F.log_softmax(output / temperature, -1)
    return {
        "kl": temperature**2 * (probabilities * log_ratio).sum(-1).mean(),
        "mse": (output - wanted).square().mean(),
        "cosine": (1 - (output * wanted).sum(-1) / output.norm(dim=-1) / wanted.norm(dim=-1)).mean(),
    }


@pytest.mark.parametrize("distance", ["kl", "mse", "cosine"])
def test_distillation_goes_to_the_dense_outputs(mlp, vectors, distance):
    """Without labels; the dense model is not changed."""
    mask, dense = magnitude(mlp, 0.5), copy.deepcopy(mlp).train()
    seen, twin = Snapshot(dense), copy.deepcopy(mlp)
    unlabelled = [x for x, _ in vectors]
    wanted = [copy.deepcopy(dense).eval()(x).detach() for x in unlabelled]
    options = {"steps": 4, "lr": 0.01, "warmup": 0.0, "distance": distance, "temperature": 2.0}
    result = finetune_masked(mlp, mask, unlabelled, distill=dense, evaluate=unlabelled, **options)
    seen.check()

    def loss_fn(model, pair):
        return distances(model(pair[0]), pair[1], 2.0)[distance]

    pairs = list(zip(unlabelled, wanted, strict=True))
    losses = by_hand(twin, mask, pairs, loss_fn, 4, 0.01, [1, 0.75, 0.5, 0.25])
    assert result.losses == pytest.approx(losses, rel=1e-4)
    for ours, theirs in zip(mlp.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    assert result.loss_after == pytest.approx(sum(loss_fn(mlp, p).item() for p in pairs) / len(pairs), rel=1e-4)


def test_dense_outputs_from_a_function_and_a_distance_of_ones_own(mlp, vectors):
    mask, twin, dense = magnitude(mlp, 0.5), copy.deepcopy(mlp), copy.deepcopy(mlp)
    named = finetune_masked(mlp, mask, vectors, steps=3, distill=dense, distance="mse")
    own = finetune_masked(
        twin, mask, vectors, steps=3, distill=lambda batch: {"logits": dense(batch[0])}, distance=nn.MSELoss(),
        loss_fn=lambda model, batch: model(batch[0]).sum(), evaluate=vectors[:1],
    )  # fmt: skip
    assert own.losses == named.losses
    assert own.loss_after == pytest.approx(twin(vectors[0][0]).sum().item(), rel=1e-5)  # the loss_fn is measured


def test_an_error_leaves_the_model_as_it_was(convnet, images):
    mask = magnitude(convnet, 0.5)
    convnet[0].weight.grad = torch.ones_like(convnet[0].weight)
    seen = Snapshot(convnet)
    bad = [*images[:2], (images[2][0] * float("nan"), images[2][1])]
    with pytest.raises(FloatingPointError, match="got nan in step 3 of 200 of retraining") as caught:
        finetune_masked(convnet, mask, bad)
    assert "the model is put back as it came in" in getattr(caught.value, "__notes__", ["put back as it came in"])[-1]
    seen.check()
    with pytest.raises(FloatingPointError, match="wanted a finite loss on the batches it is measured on"):
        finetune_masked(convnet, mask, images, evaluate=bad)
    seen.check()
    with pytest.raises(ValueError, match="loader: wanted batches, got an empty iterable"):
        finetune_masked(convnet, mask, [])
    seen.check()
    other = nn.Sequential(nn.Flatten(), nn.Linear(72, 3))
    with pytest.raises(ValueError, match=r"distill: wanted outputs in shape \(\d+, 4\), got \(\d+, 3\)"):
        finetune_masked(convnet, mask, images, distill=other)
    seen.check()


def test_an_interruption_anywhere_leaves_the_models_as_they_were(mlp, vectors):
    mask, dense, stopped = magnitude(mlp, 0.5), copy.deepcopy(mlp), 0
    seen = Snapshot(mlp), Snapshot(dense)

    def work():
        finetune_masked(mlp, mask, vectors[:1], steps=2, distill=dense, evaluate=vectors[:1])

    files = [finetune.__file__, loop.__file__, distillation.__file__, measured.__file__, state.__file__]
    for _ in every_moment(work, files, step=9):
        stopped += 1
        for snapshot in seen:
            snapshot.check()
        assert torch.is_grad_enabled()
    assert stopped > 10
    assert MaskSet.from_model(mlp) == mask
    seen[1].check()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"steps": 0}, ValueError, "steps: wanted ≥ 1, got 0"),
        ({"steps": 1.5}, TypeError, "steps: wanted an integer ≥ 1, got 1.5"),
        ({"lr": 0.0}, ValueError, "lr: wanted a finite number > 0"),
        ({"decay": "step"}, ValueError, "decay: wanted 'linear' or 'cosine', got 'step'"),
        ({"warmup": 1.0}, ValueError, r"warmup: wanted a number in \[0, 1\), got 1.0"),
        ({"warmup": "a"}, TypeError, "warmup: wanted a number"),
        ({"clip_norm": 0.0}, ValueError, "clip_norm: wanted a finite number > 0"),
        ({"distill": 3}, TypeError, "distill: wanted the dense model, a function of a batch"),
        ({"distill": len, "distance": "l1"}, ValueError, "distance: wanted one of kl, mse, cosine or a function"),
        ({"distill": len, "temperature": 0}, ValueError, "temperature: wanted a finite number > 0"),
        ({"evaluate": []}, ValueError, "evaluate: wanted batches or None, got an empty iterable"),
        ({"evaluate": torch.ones(2)}, TypeError, "evaluate: wanted an iterable of batches or None, got Tensor"),
    ],
)
def test_bad_arguments(mlp, vectors, options, error, words):
    seen, mask = Snapshot(mlp), magnitude(mlp, 0.5)
    with pytest.raises(error, match=words):
        finetune_masked(mlp, mask, vectors, **options)
    seen.check()


def test_models_and_masks_that_do_not_belong_together(mlp, vectors):
    mask = magnitude(mlp, 0.5)
    with pytest.raises(TypeError, match=r"mask: wanted a MaskSet, got list: the call is finetune_masked\(model, mask"):
        finetune_masked(mlp, vectors, mask)
    with pytest.raises(ValueError, match="wanted the model these masks were made for"):
        finetune_masked(nn.Linear(2, 2), mask, vectors)
    with pytest.raises(ValueError, match=r"distill: wanted a model with weights of its own"):
        finetune_masked(mlp, mask, vectors, distill=mlp)
    with pytest.raises(ValueError, match="wanted parameters that require gradients"):
        finetune_masked(mlp.requires_grad_(False), mask, vectors)

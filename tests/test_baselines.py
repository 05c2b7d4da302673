"""Magnitude, SNIP, a single particle, and what all methods have in common."""

import copy

import pytest
import torch

from sfpk_kernels import Coordinates, baselines, default_loss, prune
from sfpk_kernels.modeling.state import guarded

from .settings import population


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.95])
def test_magnitude_keeps_the_largest_weights(convnet, sparsity):
    masks = baselines.magnitude(convnet, sparsity)
    theta = Coordinates(convnet).flatten(convnet).abs()
    kept = masks.flat()
    assert masks.kept == round((1 - sparsity) * theta.numel())
    assert theta[kept].min() >= theta[~kept].max()


def test_snip_with_one_batch_is_the_published_score(convnet, images):
    masks = baselines.snip(convnet, images[:1], 0.8)
    with guarded(convnet, bn="batch", training=False):
        default_loss(convnet, images[0]).backward()
    score = torch.cat([(p * p.grad).abs().flatten() for p in Coordinates(convnet).parameters(convnet)])
    kept = masks.flat()
    assert masks.kept == round(0.2 * score.numel())
    assert score[kept].min() >= score[~kept].max() * (1 - 1e-5)
    assert masks != baselines.snip(convnet, images, 0.8)
    assert masks == baselines.snip(convnet, images, 0.8, max_batches=1)


def test_the_model_is_not_changed(convnet, images):
    before = {name: value.clone() for name, value in convnet.state_dict().items()}
    baselines.snip(convnet, images, 0.8)
    for name, value in convnet.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in convnet.parameters())


def test_options_and_bad_input(mlp, vectors):
    assert list(baselines.magnitude(mlp, 0.5, ignored_layers=["0"])) == ["2.weight"]
    for sparsity in (0.0, 1.0, 1.5):
        with pytest.raises(ValueError, match="sparsity: wanted"):
            baselines.magnitude(mlp, sparsity)
    with pytest.raises(TypeError, match="sparsity: wanted"):
        baselines.magnitude(mlp, "0.5")
    with pytest.raises(ValueError, match="loader: wanted batches"):
        baselines.snip(mlp, [], 0.5)
    with pytest.raises(ValueError, match="sparsity: wanted"):
        baselines.snip(mlp, vectors, 1.5)
    with pytest.raises(ValueError, match="max_batches: wanted ≥ 1"):
        baselines.snip(mlp, vectors, 0.5, max_batches=0)
    with pytest.raises(FloatingPointError, match="in batch 0"):
        baselines.snip(mlp, [(vectors[0][0] * float("nan"), vectors[0][1])], 0.5)


def test_a_single_particle_is_sfpk_with_one(mlp, vectors):
    config = population(0.7, n_particles=1, n_steps=12, seed=3)
    assert baselines.single_particle(mlp, vectors, 0.7, passes=12, seed=3) == prune(mlp, vectors, config=config).mask
    assert list(baselines.single_particle(mlp, vectors, 0.7, passes=2, ignored_layers=["0"])) == ["2.weight"]
    with pytest.raises(ValueError, match="passes: wanted ≥ 1, got 0"):
        baselines.single_particle(mlp, vectors, 0.7, passes=0)


def with_data():
    """The methods that take a loader and return masks of weights."""
    others = ("magnitude", "random", "synflow", *(name for name in baselines.__all__ if "structured" in name.lower()))
    return {name: getattr(baselines, name) for name in baselines.__all__ if name not in others}


@pytest.mark.parametrize("name", sorted(with_data()))
def test_methods_that_read_data_share_a_signature(name, mlp, vectors):
    method, few = with_data()[name], {"passes": 3} if name in ("ste", "single_particle") else {}
    model = copy.deepcopy(mlp)
    masks = method(model, vectors, 0.75, loss_fn=lambda net, batch: default_loss(net, batch), **few)
    assert masks.kept == round(0.25 * 144)
    assert list(masks) == ["0.weight", "2.weight"]
    with pytest.raises(TypeError, match="loader: wanted an iterable of batches"):
        method(model, 3, 0.75)
    with pytest.raises(TypeError, match="loss_fn: wanted a function"):
        method(model, vectors, 0.75, loss_fn=3)
    with pytest.raises(TypeError, match=f"wanted {name}\\(model, loader, sparsity"):
        method(model, vectors, 0.75, default_loss)
    if not name.endswith("_"):
        for parameter, before in zip(model.parameters(), mlp.parameters(), strict=True):
            assert torch.equal(parameter, before)

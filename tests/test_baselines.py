"""Magnitude and SNIP."""

import pytest
import torch

from sfpk_kernels import Coordinates, baselines, default_loss
from sfpk_kernels.modeling.state import guarded


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

"""The paper's and the authors' interfaces: a script in the authors' manner, and what it must leave behind."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sfpk_kernels import SFPKConfig, prune
from sfpk_kernels.compat import SFPK, SFPK_prune, init_masks_hooks, masked_params


def test_algorithm_3(mlp, vectors):
    mask = SFPK_prune(mlp, 0.8, vectors, 3, 8, 1.7, energy_mode="sequential")
    config = SFPKConfig.preset("paper", sparsity=0.8, n_particles=3, n_steps=8, radius=1.7, energy_mode="sequential")
    assert mask == prune(mlp, None, vectors, config).mask
    assert mask.kept == round(0.2 * 144)
    with pytest.raises(ValueError, match="radius"):
        SFPK_prune(mlp, 0.8, vectors, 3, 8, 0.5)


OPTIONS = {
    "N": 8, "r": 1.4, "n_mc": 3, "repl": 0.2, "repl_weighted": True, "momentum": 0.1, "vote_ratio": 1,
    "vote_mode": "soft", "settings": {"energy_mode": "sequential"},
}  # fmt: skip


def free_biases(model):
    for module in model.modules():
        if hasattr(module, "bias_mask"):
            del module.bias_mask


def prune_routine(model, pruner, criterion, loader, density, device):
    """What an experiment script does."""
    model.to(device)
    model.train()
    pruner.score(criterion, loader, device)
    pruner.mask(density)


def test_a_script_in_the_authors_manner(convnet, images):
    dense = copy.deepcopy(convnet)
    init_masks_hooks(convnet)
    free_biases(convnet)
    x = images[0][0]
    assert torch.equal(convnet.eval()(x), dense.eval()(x))
    pruner = SFPK(convnet, **OPTIONS)
    prune_routine(convnet, pruner, nn.CrossEntropyLoss(), images, 0.2, torch.device("cpu"))
    remaining, total, density = pruner.stats(convnet)
    assert total == sum(m.numel() for _, m, _ in masked_params(convnet)) == 6 * 2 * 9 + 8 * 6 * 9 + 4 * 72
    assert remaining == total - int(0.8 * total)
    assert density == remaining / total

    # The mask is that of the preset "authors" on the plain model.
    config = SFPKConfig.preset("authors", sparsity=0.8, n_particles=3, n_steps=8, energy_mode="sequential")
    expected = prune(dense.train(), None, images, config)
    for name, mask, weight in masked_params(convnet):
        assert torch.equal(mask.bool(), expected.mask[name])
        assert torch.equal(weight, dense.get_parameter(name)), "weights are not written"
        assert pruner.scores[name].shape == weight.shape

    # The hooks apply it, forward and backward.
    applied = expected.apply_(dense).eval()
    for a, b in zip(applied.buffers(), (b for n, b in convnet.named_buffers() if "mask" not in n), strict=True):
        a.copy_(b)
    assert torch.allclose(convnet.eval()(x), applied(x), rtol=0, atol=1e-5)
    F.cross_entropy(convnet(x), images[0][1]).backward()
    for _, mask, weight in masked_params(convnet):
        assert (weight.grad[mask == 0] == 0).all()
        assert (weight.grad[mask == 1] != 0).any()
    assert set(convnet.state_dict()) == set(dense.state_dict()) | {f"{n}_mask" for n, _, _ in masked_params(convnet)}


def test_successive_pruning_goes_on_from_the_particles(mlp, vectors):
    init_masks_hooks(mlp)
    pruner = SFPK(mlp, **OPTIONS)
    densities = []
    for density in (0.6, 0.3, 0.1):
        prune_routine(mlp, pruner, None, vectors, density, "cpu")
        densities.append(pruner.stats(mlp)[2])
        assert pruner.result.history[-1].density == pytest.approx(density, abs=0.1)
    assert densities == pytest.approx([0.6, 0.3, 0.1], abs=0.01)
    assert pruner.result.history[0].start_density < 0.5, "it did not begin at 1 again"


def test_biases_count_where_they_have_masks(mlp, vectors):
    init_masks_hooks(mlp)
    del mlp[2].bias_mask
    pruner = SFPK(mlp, **OPTIONS)
    prune_routine(mlp, pruner, None, vectors, 0.5, "cpu")
    assert pruner.stats(mlp)[1] == 144 + 12
    assert set(pruner.scores) == {"0.weight", "0.bias", "2.weight"}


def test_hooks_are_back_after_an_error(mlp, vectors):
    init_masks_hooks(mlp)
    pruner = SFPK(mlp, **OPTIONS)
    pruner.score(None, [(torch.randn(16, 8) * float("nan"), vectors[0][1])], "cpu")
    before = {name: mask.clone() for name, mask, _ in masked_params(mlp)}
    with pytest.raises(FloatingPointError):
        pruner.mask(0.5)
    assert all(torch.equal(mask, before[name]) for name, mask, _ in masked_params(mlp))
    mlp[0].weight_mask.zero_()
    mlp[0].bias_mask.zero_()
    out = mlp(torch.randn(3, 8))
    assert torch.allclose(out, mlp[2].bias.expand(3, 4)), "the hooks act"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("ode_scope", "local"),
        ("E", "KL"),
        ("G", "l1"),
        ("mask_option", "sign"),
        ("schedule", "cos"),
        ("N", 0),
        ("r", 0.9),
    ],
)
def test_what_is_not_covered_is_said(mlp, option, value):
    init_masks_hooks(mlp)
    with pytest.raises(ValueError, match=f"{option}: wanted|n_steps|radius"):
        SFPK(mlp, **{**OPTIONS, option: value})


def test_wrong_order_and_wrong_models(mlp, vectors):
    with pytest.raises(ValueError, match="weight_mask"):
        SFPK(mlp, **OPTIONS)
    with pytest.raises(ValueError, match="structural"):
        init_masks_hooks(mlp, structural=True)
    init_masks_hooks(mlp)
    pruner = SFPK(mlp, **OPTIONS)
    with pytest.raises(RuntimeError, match="score"):
        pruner.mask(0.5)
    pruner.score(None, vectors, "cpu")
    with pytest.raises(ValueError, match="by layer"):
        pruner.mask([0.5, 0.5])

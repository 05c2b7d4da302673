"""Baselines against the packages that offer the same method: torch itself here, the others where they are installed.

``make packages`` installs those into an environment of its own, with SFPK_REQUIRE_PACKAGES=1: there none is left out.
"""

import copy
import importlib.util
import os

import pytest
import torch
from torch import nn
from torch.ao.pruning import WeightNormSparsifier
from torch.nn.utils import prune as torch_prune

from sfpk_kernels import Coordinates, baselines

SPARSITY = 0.75


def need(package):
    """Skip without it, but where it was promised."""
    if importlib.util.find_spec(package) is None and os.environ.get("SFPK_REQUIRE_PACKAGES") != "1":
        pytest.skip(f"{package} is not installed: make packages")


def linears():
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))


def weights(model):
    return [(module, "weight") for module in model if isinstance(module, nn.Linear | nn.Conv2d)]


def kept(model):
    """What is not zero, by name as in a MaskSet."""
    return {name: parameter.detach() != 0 for name, parameter in model.named_parameters() if parameter.dim() > 1}


def same(masks, expected):
    assert set(masks) == set(expected)
    for name in masks:
        assert torch.equal(masks[name], expected[name]), name


def test_magnitude_is_torchs_global_l1(convnet):
    theirs = copy.deepcopy(convnet)
    layers = [(m, "weight") for m in theirs.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    removed = Coordinates(convnet).d - round((1 - SPARSITY) * Coordinates(convnet).d)
    torch_prune.global_unstructured(layers, torch_prune.L1Unstructured, amount=removed)
    for module, name in layers:
        torch_prune.remove(module, name)
    same(baselines.magnitude(convnet, SPARSITY), kept(theirs))


def test_uniform_magnitude_is_torchs_l1_layer_by_layer():
    model = linears()
    theirs = copy.deepcopy(model)
    for module, name in weights(theirs):
        torch_prune.remove(torch_prune.l1_unstructured(module, name, SPARSITY), name)
    same(baselines.magnitude(model, SPARSITY, allocation="uniform"), kept(theirs))


def test_patterns_are_torchs_semi_structured_ones():
    model = linears()
    theirs = copy.deepcopy(model)
    sparsifier = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2)
    sparsifier.prepare(theirs, [{"tensor_fqn": f"{name}.weight"} for name in ("0", "2")])
    sparsifier.step()
    sparsifier.squash_mask()
    same(baselines.magnitude(model, 0.5, pattern=(2, 4)), kept(theirs))


@pytest.fixture
def inputs():
    return [torch.randn(32, 16) @ torch.randn(16, 16) for _ in range(3)]


def seen(model, inputs, index):
    """What reaches a layer, of all batches."""
    with torch.no_grad():
        return [model[:index](x) for x in inputs]


def test_wanda_is_torchaos(inputs):
    need("torchao")
    from torchao.sparsity import WandaSparsifier

    model = nn.Sequential(nn.Linear(16, 24))
    theirs = copy.deepcopy(model)
    sparsifier = WandaSparsifier(semi_structured_block_size=4)
    sparsifier.prepare(theirs, [{"tensor_fqn": "0.weight"}])
    norms = torch.cat(inputs).norm(dim=0)  # theirs are squared, unlike the paper's
    for x in inputs:
        theirs(x)
    sparsifier.step()
    sparsifier.squash_mask()
    same(baselines.wanda(model, [x * norms for x in inputs], 0.5, pattern=(2, 4)), kept(theirs))


def compressed(sparsify, accumulate, start, model, inputs, **options):
    """Every layer by llm-compressor, behind those before it as it left them."""
    for index in (0, 2):
        module, total, count = model[index], start(model[index]), 0
        for x in seen(model, inputs, index):
            total, count = accumulate(x, module, total, count)
        made = sparsify(module, {module: total}, **options)
        module.weight.data = made if isinstance(made, torch.Tensor) else made[1]  # behind an error of the layer
    return model


@pytest.mark.parametrize(("sparsity", "pattern"), [(SPARSITY, None), (0.5, (2, 4))])
def test_wanda_is_llm_compressors(sparsity, pattern, inputs):
    need("llmcompressor")
    from llmcompressor.modifiers.pruning.wanda import wanda_sparsify as their

    model = linears()
    n, m = (0, 0) if pattern is None else (pattern[1] - pattern[0], pattern[1])
    theirs = compressed(
        their.sparsify_weight, their.accumulate_row_scalars, their.make_empty_row_scalars, copy.deepcopy(model), inputs,
        sparsity=sparsity, prune_n=n, prune_m=m,
    )  # fmt: skip
    same(baselines.wanda(model, inputs, sparsity, pattern=pattern), kept(theirs))


@pytest.mark.parametrize(("sparsity", "pattern"), [(SPARSITY, None), (0.5, (2, 4))])
@pytest.mark.parametrize("block", [8, 128])
def test_sparsegpt_is_llm_compressors(sparsity, pattern, block, inputs):
    need("llmcompressor")
    from llmcompressor.modifiers.pruning.sparsegpt import sgpt_sparsify as their

    model = linears()
    n, m = (0, 0) if pattern is None else (pattern[1] - pattern[0], pattern[1])
    fewer = 0.0 if pattern else 1e-4  # they take the first one that should stay of each block, too
    theirs = compressed(
        their.sparsify_weight, their.accumulate_hessian, their.make_empty_hessian, copy.deepcopy(model), inputs,
        sparsity=sparsity - fewer, prune_n=n, prune_m=m, block_size=block, dampening_frac=0.01,
        preserve_sparsity_mask=False,
    )  # fmt: skip
    ours = copy.deepcopy(model)
    masks = baselines.sparsegpt_update_(ours, inputs, sparsity, pattern=pattern, damping=0.01, block=block)
    same(masks, kept(theirs))
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)

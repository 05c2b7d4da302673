"""Heads and neurons of transformers: one coordinate each, removed from all projections at once."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sfpk_kernels.structure import Costs, ShrinkRecipe, find_structure, gate_gradient, gated_call, gated_weights, shrink

from .attention_nets import Attention, Mlp, transformer, vit
from .snapshot import Snapshot


def multiplied(model, inputs):
    """MACs by torch's counter; attention in separate products, which it counts on every device."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(**inputs)
    return counter.get_total_flops() // 2


CASES = [
    ("bert", {}), ("llama", {"attn_implementation": "eager"}), ("llama", {"attn_implementation": "sdpa"}),
    ("gpt2", {}), ("vit", {}), ("swin", {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), CASES)
def test_shrunk_equals_masked(name, options):
    model, inputs, heads, neurons = transformer(name, **options)
    model.eval()
    snapshot = Snapshot(model)
    structure = find_structure(model, inputs)
    sizes = sorted((group.kind, group.size) for group in structure.groups)
    assert sizes == sorted([("head", heads), ("neuron", neurons)] * 2)
    keep = torch.rand(structure.size) > 0.4
    for group in structure.groups:
        keep[group.first] = True
        if group.kind == "head":
            keep[group.first + 1] = group is not structure.groups[0]  # layers of different width
    smaller = shrink(model, structure, keep)
    masked, shrunk, dense = gated_call(model, structure, keep, (), inputs), smaller(**inputs), model(**inputs)
    assert (masked.logits - shrunk.logits).abs().max() <= 1e-5 * dense.logits.abs().max()
    assert (masked.logits - dense.logits).abs().max() > 1e-3 * dense.logits.abs().max()
    costs = Costs(model, structure, (), inputs)
    assert costs.cost(keep, "params") == sum(p.numel() for p in smaller.parameters())
    assert costs.dense["params"] == sum(p.numel() for p in model.parameters())
    assert costs.dense["macs"] == multiplied(model, inputs)
    assert costs.cost(keep, "macs") == multiplied(smaller, inputs)
    snapshot.check()
    fresh = ShrinkRecipe.of(structure, keep).shrink(transformer(name, **options)[0].eval())
    fresh.load_state_dict(smaller.state_dict())
    assert torch.equal(fresh(**inputs).logits, shrunk.logits)


def test_generation_with_a_cache_of_different_widths():
    model, inputs, *_ = transformer("llama")
    model.eval()
    structure = find_structure(model, inputs)
    keep = torch.ones(structure.size, dtype=torch.bool)
    keep[structure.groups[0].first] = False
    smaller = shrink(model, structure, keep)
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in gated_weights(structure, dict(model.named_parameters()), keep).items():
            masked.get_parameter(name).copy_(weight)
    text = inputs["input_ids"]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(smaller.generate(text, **options), masked.generate(text, **options))


def test_one_projection_for_all():
    """timm's layout, by hand: without head 1, its rows are gone from all three parts."""
    model, x = vit()
    structure = find_structure(model, x)
    assert [(g.name, g.kind, g.size) for g in structure.groups] == [
        (f"{i}.{name}", kind, size)
        for i in (1, 2)
        for name, kind, size in (("attn.qkv", "head", 4), ("mlp.fc1", "neuron", 24))
    ]
    keep = torch.ones(structure.size, dtype=torch.bool)
    keep[1] = False
    smaller = shrink(model, structure, keep)
    rows = [part * 16 + row for part in range(3) for row in range(16) if not 4 <= row < 8]
    assert torch.equal(smaller[1].attn.qkv.weight, model[1].attn.qkv.weight[rows])
    assert (smaller[1].attn.num_heads, smaller[1].attn.attn_dim, smaller[1].attn.head_dim) == (3, 12, 4)
    torch.testing.assert_close(smaller(x), gated_call(model, structure, keep, (x,)))
    costs = Costs(model, structure, (x,))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        smaller(x)
    assert costs.cost(keep, "macs") == counter.get_total_flops() // 2
    rows = 2 * 6  # samples, positions
    per_head = 2 * rows * 6 * 4 + rows * 4 * 4 * 16  # by keys and by values; three projections and what reads them
    assert costs.dense["macs"] - costs.cost(keep, "macs") == per_head


def test_every_head_and_neuron_has_a_gradient():
    model, x = vit()
    model, x = model.double(), x.double()
    structure = find_structure(model, x)
    keep = (torch.arange(structure.size) % 3 > 0).double().requires_grad_()
    gated_call(model, structure, keep, (x,)).square().sum().backward()
    tensors = dict(model.named_parameters())
    gated = {n: w.detach().requires_grad_() for n, w in gated_weights(structure, tensors, keep.detach()).items()}
    torch.func.functional_call(model, gated, (x,)).square().sum().backward()
    found = gate_gradient(structure, tensors, {name: w.grad for name, w in gated.items()})
    torch.testing.assert_close(found, keep.grad)
    assert (found != 0).all()


def test_encoder_layers_of_torch_lose_neurons():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 24, batch_first=True), 2).eval()
    x = torch.randn(2, 5, 16)
    structure = find_structure(encoder, x)
    assert [(g.name, g.kind, g.size) for g in structure.groups] == [
        ("layers.0.linear1", "neuron", 24), ("layers.1.linear1", "neuron", 24),
    ]  # fmt: skip
    keep = torch.rand(structure.size) > 0.5
    smaller = shrink(encoder, structure, keep)
    torch.testing.assert_close(smaller(x), gated_call(encoder, structure, keep, (x,)), rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # the fast path of inference
        torch.testing.assert_close(smaller(x), gated_call(encoder, structure, keep, (x,)), rtol=1e-5, atol=1e-5)


def test_ignored_and_tied_stay():
    model, x = vit()
    structure = find_structure(model, x, ignored_layers=["1.attn", Mlp])
    assert [group.name for group in structure.groups] == ["2.attn.qkv"]
    assert structure.protected["1.attn.qkv"] == structure.protected["1.mlp.fc1"] == "ignored_layers"
    model[2].mlp = model[1].mlp
    structure = find_structure(model, x)
    assert [group.name for group in structure.groups] == ["1.attn.qkv", "2.attn.qkv"]
    assert structure.protected["1.mlp.fc1"] == "tied weights"


def test_heads_that_do_not_fit_are_refused():
    """The names of timm's attention on something else: what it computes is compared, and the module named."""
    model, x = vit()

    class Mixed(Attention):
        def forward(self, x):
            return super().forward(x) + self.qkv(x)[..., :16].cumsum(-1)

    model[1].attn.__class__ = Mixed
    with pytest.raises(ValueError, match=r"removing some heads of 1\.attn\.qkv cannot be done right"):
        find_structure(model, x)


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "vit_small_patch16_224"])
def test_timm(name):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, img_size=64, num_classes=10, depth=2).eval()
    x = torch.randn(2, 3, 64, 64)
    structure = find_structure(model, x)
    assert {group.kind for group in structure.groups} == {"head", "neuron"}
    keep = torch.arange(structure.size) % 3 > 0
    torch.testing.assert_close(
        shrink(model, structure, keep)(x), gated_call(model, structure, keep, (x,)), rtol=1e-5, atol=1e-5
    )

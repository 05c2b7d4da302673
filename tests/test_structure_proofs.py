"""Every kind of architecture, small: shrunk computes what masked does, costs and budgets are exact, refusals name."""

import time

import pytest
import torch

from sfpk_kernels.structure import find_structure

from .architectures import attentive, convolutional, refused
from .architectures.proof import alive, by_torch, prove, prove_gradients
from .snapshot import Snapshot

pytest.importorskip("torch_pruning")

IMAGE, ROW = (3, 32, 32), (12,)
CONV, BLOCK = {"channel"}, {"head", "neuron"}
SMALL = {  # what is built, shape of an example, kinds of coordinates
    "plain": (convolutional.plain, IMAGE, CONV),
    "resnet-20": (convolutional.resnet20, IMAGE, CONV),
    "resnet-50": (convolutional.resnet50, IMAGE, CONV),
    "resnext-50": (convolutional.resnext50, IMAGE, CONV),
    "vgg": (convolutional.vgg, IMAGE, {"channel", "neuron"}),
    "mobilenet-v1": (convolutional.mobilenet_v1, IMAGE, CONV),
    "mobilenet-v2": (convolutional.mobilenet_v2, IMAGE, CONV),
    "mobilenet-v3": (convolutional.mobilenet_v3, IMAGE, {"channel", "neuron"}),
    "efficientnet": (convolutional.efficientnet, IMAGE, CONV),
    "densenet": (convolutional.densenet, IMAGE, CONV),
    "u-net": (convolutional.UNet, IMAGE, CONV),
    "yolo-c2f": (convolutional.yolo, IMAGE, CONV),
    "retinanet": (refused.Detector, IMAGE, CONV),
    "deit": (attentive.Deit, IMAGE, BLOCK),
    "swin": (attentive.Swin, IMAGE, BLOCK),
    "convnext": (attentive.convnext, IMAGE, {"channel", "neuron"}),
    "glu": (attentive.Gated, IMAGE, {"channel", "neuron"}),
    "mlp": (attentive.mlp, ROW, {"neuron"}),
}
FULL = {  # depths and widths as published
    "resnet-20": (lambda: convolutional.resnet20(16), IMAGE),
    "resnet-50": (lambda: convolutional.resnet50(64, (3, 4, 6, 3)), (3, 64, 64)),
    "resnext-50": (lambda: convolutional.resnext50(64, (3, 4, 6, 3), 32), (3, 64, 64)),
    "densenet-121": (lambda: convolutional.densenet(32, (6, 12, 24, 16)), IMAGE),
    "u-net": (lambda: convolutional.UNet(64, 4), IMAGE),
    "swin-t": (lambda: attentive.Swin(96, 3, (2, 2, 6, 2), 32, 4), (3, 128, 128)),
    "deit-t": (lambda: attentive.Deit(192, 3, 12, 64), (3, 64, 64)),
    "convnext-t": (lambda: attentive.convnext(96, (3, 3, 9, 3)), (3, 64, 64)),
}


SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
GROUPED = {**SIZES, "num_attention_heads": 8, "num_key_value_heads": 4}
PAIRED = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
WORDS = {  # class of transformers, its configuration, settings, kinds of coordinates
    "bert": ("BertForMaskedLM", "BertConfig", SIZES, BLOCK),
    "llama-sdpa": ("LlamaForCausalLM", "LlamaConfig", {**GROUPED, "attn_implementation": "sdpa"}, BLOCK),
    "llama-eager": ("LlamaForCausalLM", "LlamaConfig", {**GROUPED, "attn_implementation": "eager"}, BLOCK),
    "gpt-2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4}, BLOCK),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SIZES, BLOCK),
    "phi-3": ("Phi3ForCausalLM", "Phi3Config", {**SIZES, "pad_token_id": 0, "eos_token_id": 1}, {"neuron"}),
    "t5": ("T5ForConditionalGeneration", "T5Config", PAIRED, {"neuron"}),
    "mpnet": ("MPNetForMaskedLM", "MPNetConfig", SIZES, {"neuron"}),
}


def words(name):
    """(model, inputs, kinds)"""
    transformers = pytest.importorskip("transformers")
    model, config, sizes, kinds = WORDS[name]
    torch.manual_seed(0)
    inputs = {"input_ids": torch.randint(2, 120, (2, 7))}
    if name == "t5":
        inputs["decoder_input_ids"] = torch.randint(2, 120, (2, 5))
    made = getattr(transformers, model)(getattr(transformers, config)(vocab_size=120, **sizes))
    return alive(made, inputs), inputs, kinds


def made(factory, shape):
    torch.manual_seed(0)
    x = torch.randn(2, *shape)
    return alive(factory(), x), x


@pytest.mark.parametrize("name", SMALL)
def test_masked_is_shrunk_and_budgets_are_met(name):
    factory, shape, kinds = SMALL[name]
    model, x = made(factory, shape)
    snapshot = Snapshot(model)
    structure = prove(model, x)
    assert {group.kind for group in structure.groups} == kinds
    assert len(structure.groups) > 2
    snapshot.check()


@pytest.mark.parametrize("name", WORDS)
def test_language_models(name):
    model, inputs, kinds = words(name)
    snapshot = Snapshot(model)
    structure = prove(model, inputs, by_torch, 0.2)
    assert {group.kind for group in structure.groups} == kinds
    if "head" not in kinds:
        assert {why.partition(":")[0] for why in structure.protected.values()} == {"its heads stay"}
    snapshot.check()


def test_a_bias_by_head_of_the_whole_model():
    """Bloom computes one for the heads of all layers at once."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BloomConfig(vocab_size=120, hidden_size=64, n_layer=2, n_head=4)
    torch.manual_seed(0)
    model, inputs = transformers.BloomForCausalLM(config).eval(), {"input_ids": torch.randint(2, 120, (2, 7))}
    first = r"transformer\.h\.0\.self_attention\.query_key_value"
    with pytest.raises(ValueError, match=rf"removing some heads of {first} cannot be .* ignored_layers=\['{first}'\]"):
        find_structure(model, inputs)
    structure = find_structure(model, inputs, on_refusal="protect")
    assert [group.kind for group in structure.groups] == ["neuron"] * 2
    assert sum("cannot be removed" in why for why in structure.protected.values()) == 2


def test_attention_of_a_layout_that_is_not_known():
    """Falcon: one reshape is taken for another, and round a residual block there would be ever more positions."""
    transformers = pytest.importorskip("transformers")
    config = transformers.FalconConfig(vocab_size=120, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(0)
    model, inputs = transformers.FalconForCausalLM(config).eval(), {"input_ids": torch.randint(2, 120, (2, 7))}
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"outputs of transformer\.h\.1\.self_attention\.query_key_value cannot be"):
        find_structure(model, inputs)
    structure = find_structure(model, inputs, on_refusal="protect")
    assert time.monotonic() - start < 20  # of 30 each: it ends by itself
    assert [group.kind for group in structure.groups] == ["neuron"] * 2


LONG = ("retinanet", "resnet-50")  # with nothing that others have not: for the slow tests


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in SMALL]
)
def test_gradients_of_what_is_kept(name):
    factory, shape, _ = SMALL[name]
    prove_gradients(*made(factory, shape))


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_full_size(name):
    model, x = made(*FULL[name])
    prove(model, x)


REFUSED = {  # what is built, shape, what the error says, groups that are left where such things are protected
    "GroupNorm": (refused.GroupNormed, IMAGE, r"outputs of first .* they reach norm \(GroupNorm\)", {"stem.0.0"}),
    "channel shuffle": (
        refused.shufflenet, IMAGE, r"(outputs|channels) of (1\.first\.0|0\.0|2\.first\.0) ", {"3.0"},
    ),
    "LSTM": (refused.Reader, IMAGE, r"outputs of features\.1\.0 .* they reach lstm \(LSTM\)", {"features.0.0"}),
    "PixelShuffle": (
        refused.SuperResolution, IMAGE, r"outputs of wide .* they reach shuffle \(PixelShuffle\)", {"first", "second"},
    ),
    "MultiheadAttention": (
        refused.encoder, (5, 12), r"outputs of 0 .* they reach 1.attention \(MultiheadAttention\)", {"1.mlp.0"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_or_protected(name):
    factory, shape, words, left = REFUSED[name]
    model, x = made(factory, shape)
    snapshot = Snapshot(model)
    start = time.monotonic()
    with pytest.raises(ValueError, match=f"model: .*{words}.*ignored_layers="):
        find_structure(model, x)
    assert time.monotonic() - start < 10  # of 30, no hang
    structure = prove(model, x, by_torch, 0.2, on_refusal="protect")
    assert left <= {group.name for group in structure.groups}
    assert any("cannot be removed" in why for why in structure.protected.values())
    snapshot.check()

"""Which matrices of real architectures are covered: nearly all, the rest by name and with a reason."""

import pytest
from torch import nn

from sfpk_kernels import Coordinates

from .reach_nets import Attention, Bare, Cell, Mixture, Own, Recurrent

LLAMA = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 128, "vocab_size": 100,
}  # fmt: skip
BERT = {key: LLAMA[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
IMAGE = {**BERT, "image_size": 32, "patch_size": 8}
SPEECH = {
    "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
SMALL = {"vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2}
# By model: its class and settings in transformers, and the matrices that are left alone beside embeddings.
MODELS = {
    "mixtral": ("Mixtral", "ForCausalLM", {**LLAMA, "num_local_experts": 4}, {"gate.weight"}),
    "qwen2-moe": (
        "Qwen2Moe", "ForCausalLM",
        {**LLAMA, "num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
        {"gate.weight"},
    ),
    "qwen3-moe": (
        "Qwen3Moe", "ForCausalLM", {**LLAMA, "num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16},
        {"gate.weight"},
    ),
    "gpt-oss": (
        "GptOss", "ForCausalLM", {**LLAMA, "num_local_experts": 4, "head_dim": 16},
        {"experts.gate_up_proj_bias", "experts.down_proj_bias", "router.weight"},
    ),
    "granite-moe": ("GraniteMoe", "ForCausalLM", {**LLAMA, "num_local_experts": 4}, {"router.weight"}),
    "olmoe": ("Olmoe", "ForCausalLM", {**LLAMA, "num_experts": 4, **SMALL}, {"gate.weight"}),
    "llama": ("Llama", "ForCausalLM", LLAMA, set()),
    "mamba": ("Mamba", "ForCausalLM", {"hidden_size": 128, "num_hidden_layers": 2, "state_size": 8, **SMALL},
              {"mixer.A_log"}),
    "mamba2": (
        "Mamba2", "ForCausalLM",
        {"hidden_size": 128, "num_hidden_layers": 2, "state_size": 16, "num_heads": 8, "head_dim": 32, **SMALL}, set(),
    ),
    "gpt2": ("GPT2", "LMHeadModel", {"n_embd": 64, "n_layer": 2, "n_head": 4, **SMALL}, set()),
    "bert": ("Bert", "ForSequenceClassification", {**BERT, "vocab_size": 100}, set()),
    "roberta": ("Roberta", "ForSequenceClassification", {**BERT, "vocab_size": 100}, set()),
    "t5": ("T5", "ForConditionalGeneration",
           {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 100}, set()),
    "whisper": ("Whisper", "ForConditionalGeneration", SPEECH, set()),
    "vit": ("ViT", "ForImageClassification", IMAGE, {"embeddings.position_embeddings", "embeddings.cls_token"}),
    "swin": (
        "Swin", "ForImageClassification",
        {"embed_dim": 32, "depths": [1, 1], "num_heads": [2, 4], "image_size": 32, "patch_size": 4, "window_size": 4},
        {"relative_position_bias.relative_position_bias_table"},
    ),
    "clip": ("CLIP", "Model", {"text_config": {**BERT, **SMALL}, "vision_config": IMAGE, "projection_dim": 32}, set()),
    "resnet": (
        "ResNet", "ForImageClassification", {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}, set()
    ),
    "segformer": (
        "Segformer", "ForSemanticSegmentation", {"hidden_sizes": [16, 32, 64, 64], "decoder_hidden_size": 64}, set()
    ),
    "rwkv": ("Rwkv", "ForCausalLM", {"hidden_size": 64, "num_hidden_layers": 2, **SMALL},
             {"attention.time_mix_key", "attention.time_mix_value", "attention.time_mix_receptance",
              "feed_forward.time_mix_key", "feed_forward.time_mix_receptance"}),
}  # fmt: skip


def build(name):
    transformers = pytest.importorskip("transformers")
    kind, suffix, options, _ = MODELS[name]
    config, model = getattr(transformers, f"{kind}Config", None), getattr(transformers, f"{kind}{suffix}", None)
    if config is None or model is None:
        pytest.skip(f"this version of transformers has no {kind}{suffix}")
    return model(config(**options))


def left(coordinates):
    """Matrices that are not covered, but embeddings, which are said to be some."""
    return [skip for skip in coordinates.skipped if len(skip.shape) > 1 and not skip.reason.startswith("embedding")]


@pytest.mark.parametrize("name", MODELS)
def test_matrices_are_covered(name):
    coordinates = Coordinates(build(name))
    rest = left(coordinates)
    assert {".".join(skip.name.split(".")[-2:]) for skip in rest} == MODELS[name][3]
    assert coordinates.d >= 0.95 * (coordinates.d + sum(skip.numel for skip in rest))
    for skip in rest:
        assert f"include=[{skip.name!r}] prunes it" in skip.reason


@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name][3]])
def test_what_is_left_is_one_option_away(name):
    model = build(name)
    rest = left(Coordinates(model))
    covered = Coordinates(model, include=[skip.name for skip in rest])
    assert left(covered) == []
    assert covered.d == Coordinates(model).d + sum(skip.numel for skip in rest)


@pytest.mark.parametrize(
    ("name", "inputs"), [("mixtral", 2), ("qwen2-moe", 2), ("qwen3-moe", 2), ("granite-moe", 2), ("gpt-oss", 1)]
)
def test_experts_count_one_by_one(name, inputs):
    model = build(name)
    stacks = [tensor for tensor in Coordinates(model).tensors if tensor.stack > 1]
    assert len(stacks) == 4, "two in each of two layers"
    for tensor in stacks:
        assert (tensor.stack, tensor.input_dim) == (4, inputs)
        hidden = 64 if "up" in tensor.name or "input" in tensor.name else model.config.intermediate_size
        if name in ("mixtral", "gpt-oss", "granite-moe"):
            assert tensor.inputs == hidden, "as many as the layer's inputs"


@pytest.mark.parametrize(
    ("name", "output"),
    [
        ("llama", "lm_head.weight"), ("mixtral", "lm_head.weight"), ("bert", "classifier.weight"),
        ("roberta", "classifier.out_proj.weight"), ("vit", "classifier.weight"), ("resnet", "classifier.1.weight"),
        ("rwkv", "head.weight"), ("gpt2", None), ("mamba", None),
    ],
)  # fmt: skip
def test_output_layers_are_said_to_be_some(name, output):
    """Tied ones are embeddings, and left alone with these."""
    model = build(name)
    coordinates = Coordinates(model)
    assert [tensor.name for tensor in coordinates.tensors if tensor.is_output] == ([] if output is None else [output])
    words = f"an output layer: ignored_layers=[{output!r}] leaves it alone"
    assert (words in coordinates.describe()) == (output is not None)
    if output is not None:
        assert output not in [tensor.name for tensor in Coordinates(model, ignored_layers=[output]).tensors]


def test_a_parametrized_convolution_says_what_to_do():
    """The positions of wav2vec 2.0, the one matrix of it that is not covered, until its weight norm is removed."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Wav2Vec2Config(
        **BERT, vocab_size=32, conv_dim=(32, 32), conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
    )  # fmt: skip
    model = transformers.Wav2Vec2ForCTC(config)
    rest = [skip for skip in left(Coordinates(model)) if "pos_conv_embed" in skip.name]
    assert rest
    assert all("parametrized" in skip.reason or "weight_norm" in skip.reason for skip in rest)
    nn.utils.parametrize.remove_parametrizations(model.wav2vec2.encoder.pos_conv_embed.conv, "weight")
    assert left(Coordinates(model)) == []


OWN = {
    "lstm tagger": (Recurrent, {}, 1.0),
    "gru tagger": (lambda: Recurrent(nn.GRU), {}, 1.0),
    "lstm cell": (Cell, {}, 1.0),
    "mixture": (Mixture, {}, 0.9),  # the biases of its experts are two-dimensional
    "own layers": (Own, {}, 0.9),  # vectors of attention
    "graph attention": (lambda: Attention(16, 4, 8), {}, 0.85),
    "bare parameters": (Bare, {"include": ["first", "more", "named"]}, 1.0),
}


@pytest.mark.parametrize("name", OWN)
def test_own_networks(name):
    make, options, share = OWN[name]
    coordinates = Coordinates(make(), **options)
    assert coordinates.d >= share * (coordinates.d + sum(skip.numel for skip in left(coordinates)))


def test_diffusion_networks():
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.UNet2DModel(
        sample_size=16, block_out_channels=(32, 64), norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    assert left(Coordinates(model)) == []


def test_graph_networks():
    layers = pytest.importorskip("torch_geometric.nn")
    for layer in (layers.Linear(8, 4), layers.GCNConv(16, 32), layers.SAGEConv(16, 32), layers.ChebConv(16, 32, 3)):
        assert left(Coordinates(layer)) == []
    assert {skip.name for skip in left(Coordinates(layers.GATConv(16, 8, 4)))} == {"att_src", "att_dst"}
    (relations,) = Coordinates(layers.RGCNConv(16, 32, 3)).tensors
    assert (relations.stack, relations.inputs) == (3, 16)

"""Small models with attention: blocks as in timm, and transformers of Hugging Face with random weights."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    """As in timm: one projection for queries, keys and values."""

    def __init__(self, width=16, heads=4):
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = heads, width // heads, width
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        n, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        y = (q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(n, length, self.attn_dim))


class Mlp(nn.Module):
    def __init__(self, width=16, hidden=24):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = nn.LayerNorm(16), Attention(), nn.LayerNorm(16), Mlp()

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def vit():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 16), Block(), Block(), nn.Linear(16, 3)).eval(), torch.randn(2, 6, 5)


def transformer(name, **options):
    """(model, inputs, heads of a layer, neurons of a layer), with random weights."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    words, text = {"vocab_size": 50}, {"input_ids": torch.randint(0, 50, (2, 7))}
    images = {"pixel_values": torch.randn(2, 3, 32, 32)}
    if name == "bert":
        return transformers.BertForMaskedLM(transformers.BertConfig(**words, **small, **options)), text, 4, 48
    if name == "llama":
        grouped = transformers.LlamaConfig(
            **words, **{**small, "num_attention_heads": 8}, num_key_value_heads=4, **options
        )
        return transformers.LlamaForCausalLM(grouped), text, 4, 48
    if name == "gpt2":
        config = transformers.GPT2Config(**words, n_embd=32, n_layer=2, n_head=4, n_inner=48, **options)
        return transformers.GPT2LMHeadModel(config), text, 4, 48
    if name == "vit":
        config = transformers.ViTConfig(image_size=32, patch_size=8, **small, **options)
        return transformers.ViTForImageClassification(config), images, 4, 48
    assert name == "swin"
    sizes = {"embed_dim": 32, "window_size": 2, "depths": [2], "num_heads": [4], "mlp_ratio": 1.5}
    config = transformers.SwinConfig(image_size=32, patch_size=4, **sizes, **options)
    return transformers.SwinForImageClassification(config), images, 4, 48

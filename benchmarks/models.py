"""Models of the kinds people prune, of any size: for benchmarks and tests, untrained.

Shapes follow the published architectures (ResNet for CIFAR, VGG, MobileNet V1, ViT/DeiT, GPT-2); only what matters to
their shapes and operators is here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def mlp(sizes: tuple[int, ...] = (64, 512, 128, 10), dropout: float = 0.0) -> nn.Module:
    """Linear layers with ReLU (and dropout) between them."""
    layers: list[nn.Module] = [nn.Flatten()]
    for i, (a, b) in enumerate(pairwise(sizes)):
        layers += ([nn.ReLU(), nn.Dropout(dropout)] if i else []) + [nn.Linear(a, b)]
    return nn.Sequential(*layers)


class _Residual(nn.Module):
    def __init__(self, channels: int, out: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(*_conv(channels, out, 3, stride), nn.ReLU(), *_conv(out, out, 3, 1))
        changes = stride > 1 or out != channels
        self.shortcut = nn.Sequential(*_conv(channels, out, 1, stride)) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def _conv(channels: int, out: int, kernel: int, stride: int, groups: int = 1) -> list[nn.Module]:
    """A convolution and its batch-norm."""
    conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(out)]


def resnet(depth: int = 20, width: int = 16, classes: int = 10, channels: int = 3) -> nn.Module:
    """A CIFAR residual net, 6k + 2 layers deep; a wide one with ``width`` 64 and more."""
    layers: list[nn.Module] = [*_conv(channels, width, 3, 1), nn.ReLU()]
    inside = width
    for stage in range(3):
        for block in range((depth - 2) // 6):
            out = width * 2**stage
            layers.append(_Residual(inside, out, 2 if stage and not block else 1))
            inside = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, classes))


class _Bottleneck(nn.Module):
    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        out = 4 * width
        first, middle = _conv(channels, width, 1, 1), _conv(width, width, 3, stride)
        self.body = nn.Sequential(*first, nn.ReLU(), *middle, nn.ReLU(), *_conv(width, out, 1, 1))
        changes = stride > 1 or out != channels
        self.shortcut = nn.Sequential(*_conv(channels, out, 1, stride)) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def resnet50(classes: int = 1000) -> nn.Module:
    """ResNet-50 for images of 224 × 224, 25.5 M prunable weights."""
    layers: list[nn.Module] = [*_conv(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inside = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        for block in range(blocks):
            layers.append(_Bottleneck(inside, 64 * 2**stage, 2 if stage and not block else 1))
            inside = 256 * 2**stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, classes))


def resnet18(classes: int = 1000) -> nn.Module:
    """ResNet-18 for images of 224 × 224, 11.7 M parameters."""
    layers: list[nn.Module] = [*_conv(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inside = 64
    for stage in range(4):
        for block in range(2):
            layers.append(_Residual(inside, 64 * 2**stage, 2 if stage and not block else 1))
            inside = 64 * 2**stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, classes))


def vgg(plan: tuple[int, ...] = (64, 0, 128, 0, 256, 256, 0, 512, 512, 0), classes: int = 10) -> nn.Module:
    """Convolutions with batch-norm; 0 halves the image."""
    layers: list[nn.Module] = []
    inside = 3
    for out in plan:
        layers += [nn.MaxPool2d(2)] if out == 0 else [*_conv(inside, out, 3, 1), nn.ReLU()]
        inside = out or inside
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, classes))


def mobilenet(width: float = 1.0, classes: int = 10, channels: int = 3) -> nn.Module:
    """MobileNet V1: depthwise and pointwise convolutions."""

    def wide(out: int) -> int:
        return max(4, int(out * width))

    inside = wide(32)
    layers: list[nn.Module] = [*_conv(channels, inside, 3, 2), nn.ReLU()]
    plan = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]
    for out, stride in plan:
        layers += [*_conv(inside, inside, 3, stride, groups=inside), nn.ReLU()]
        layers += [*_conv(inside, wide(out), 1, 1), nn.ReLU()]
        inside = wide(out)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, classes))


class _Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, dim: int, heads: int, causal: bool):
        super().__init__()
        self.num_heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)  # names of timm: structure.adapters has them
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.proj(attended.transpose(1, 2).reshape(batch, tokens, -1))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Vit(nn.Module):
    """Vision transformer; DeiT-T is (192, 12, 3) at 224 × 224 in patches of 16, DeiT-S (384, 12, 6)."""

    def __init__(self, dim: int = 192, depth: int = 12, heads: int = 3, image: int = 224, patch: int = 16,
                 classes: int = 10):  # fmt: skip
        super().__init__()
        self.patches = nn.Conv2d(3, dim, patch, patch)
        self.first = nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Parameter(0.02 * torch.randn(1, (image // patch) ** 2 + 1, dim))
        self.blocks = nn.Sequential(*(_Block(dim, heads, False) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, classes)."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


class Gpt(nn.Module):
    """GPT-2 with tied embeddings; dict batches in, a dict with ``loss`` out, as in Hugging Face models."""

    def __init__(self, dim: int = 768, depth: int = 12, heads: int = 12, vocabulary: int = 32000, tokens: int = 128):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.position = nn.Embedding(tokens, dim)
        self.blocks = nn.Sequential(*(_Block(dim, heads, True) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Logits, and with labels the loss."""
        places = torch.arange(input_ids.shape[1], dtype=torch.int64, device=input_ids.device)
        logits = self.head(self.norm(self.blocks(self.embedding(input_ids) + self.position(places))))
        if labels is None:
            return {"logits": logits}
        return {"logits": logits, "loss": F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())}


class Recurrent(nn.Module):
    """An LSTM over a sequence of vectors."""

    def __init__(self, inputs: int = 8, hidden: int = 16, classes: int = 10):
        super().__init__()
        self.rnn, self.head = nn.LSTM(inputs, hidden, batch_first=True), nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, classes)."""
        return self.head(self.rnn(x)[0][:, -1])


def images(size: int, channels: int = 3, classes: int = 10) -> Callable[[int], Any]:
    """Makes random batches (x, y) of so many images."""

    def make(batch: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(batch, channels, size, size, dtype=torch.float32, device="cpu")
        return x, torch.randint(classes, (batch,), dtype=torch.int64, device="cpu")

    return make


def texts(tokens: int, vocabulary: int) -> Callable[[int], Any]:
    """Makes random dict batches of so many texts, every token a label."""

    def make(batch: int) -> dict[str, Tensor]:
        words = torch.randint(vocabulary, (batch, tokens), dtype=torch.int64, device="cpu")
        return {"input_ids": words, "labels": words}

    return make


@dataclass(frozen=True)
class Workload:
    """A model to prune, and batches for it."""

    name: str
    build: Callable[[], nn.Module]
    make_batch: Callable[[int], Any]
    batch: int  # samples, for two CPU cores
    gpu_batch: int = 256


WORKLOADS = {
    work.name: work
    for work in (
        Workload("mlp", mlp, images(8, channels=1), 16),
        Workload("resnet-demo", lambda: resnet(8, 16, channels=1), images(8, channels=1), 64),
        Workload("resnet-20", resnet, images(32), 8),
        Workload("mobilenet-v1", mobilenet, images(64), 4),
        Workload("deit-t", Vit, images(224), 1, 128),
        Workload("gpt-100m", Gpt, texts(64, 32000), 1, 32),
        Workload("resnet-50", resnet50, images(224, classes=1000), 1),
        # Some hundred megabytes in seconds: for the tests of predicted memory.
        Workload("wide-mlp", lambda: mlp((64, 2048, 2048, 10)), images(8, channels=1), 64),
        Workload("wide-resnet-20", lambda: resnet(20, 64), images(32), 16),
        Workload("vit-small", lambda: Vit(256, 6, 4, image=64, patch=8), images(64), 16),
        Workload("gpt-small", lambda: Gpt(512, 6, 8, vocabulary=8000, tokens=64), texts(64, 8000), 8),
    )
}

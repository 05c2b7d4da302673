"""DeiT, Swin and ConvNeXt, with the names that timm gives their parts; an MLP."""

import torch
import torch.nn.functional as F
from torch import nn


class Product(nn.Module):
    """A product of matrices that a hook sees."""

    def forward(self, a, b):
        return a @ b


class Mlp(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Attention(nn.Module):
    """Queries, keys and values by one layer; within windows a bias for every pair of places."""

    def __init__(self, width, heads, window=None):
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = heads, width // heads, width
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.scores, self.mix, self.window = Product(), Product(), window
        if window:
            self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
            places = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
            far = (places[:, :, None] - places[:, None]) + window - 1
            self.register_buffer("places", far[0] * (2 * window - 1) + far[1])  # (window², window²)

    def forward(self, x, seen=None):
        n, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        scores = self.scores(q, k.transpose(-2, -1)) * self.head_dim**-0.5
        if self.window:
            scores = scores + self.relative_position_bias_table[self.places].permute(2, 0, 1)
        if seen is not None:  # (windows, length, length)
            scores = scores.view(-1, len(seen), *scores.shape[1:]) + seen[:, None]
            scores = scores.flatten(0, 1)
        y = self.mix(scores.softmax(-1), v)
        return self.proj(y.transpose(1, 2).reshape(n, length, self.attn_dim))


class Block(nn.Module):
    def __init__(self, width, heads, times=4):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = Attention(width, heads), Mlp(width, times * width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Deit(nn.Module):
    """Patches, a token for the class and one for the teacher, blocks."""

    def __init__(self, width=32, heads=4, depth=3, image=32, patch=8):
        super().__init__()
        self.embed = nn.Conv2d(3, width, patch, patch)
        self.tokens = nn.Parameter(torch.zeros(1, 2, width))
        self.places = nn.Parameter(torch.zeros(1, 2 + (image // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head, self.teacher = nn.LayerNorm(width), nn.Linear(width, 10), nn.Linear(width, 10)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.tokens.expand(len(x), -1, -1), x], 1) + self.places
        x = self.norm(self.blocks(x))
        return (self.head(x[:, 0]) + self.teacher(x[:, 1])) / 2


class SwinBlock(nn.Module):
    """Attention within windows, those of every other block shifted by half a window."""

    def __init__(self, width, heads, size, window, shift):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = Attention(width, heads, window), Mlp(width, 4 * width)
        self.size, self.window, self.shift = size, window, shift
        if shift:
            part = torch.zeros(1, size, size, 1)
            for number, rows in enumerate((slice(-window), slice(-window, -shift), slice(-shift, None))):
                part[:, rows] += 3 * number
                part[:, :, rows] += number
            part = self.windows(part)[..., 0]
            self.register_buffer("seen", -100.0 * (part[:, :, None] != part[:, None]))
        else:
            self.seen = None

    def windows(self, x):
        n, w, s = len(x), self.window, self.size // self.window
        return x.view(n, s, w, s, w, -1).transpose(2, 3).reshape(n * s * s, w * w, -1)

    def whole(self, x):
        w, s = self.window, self.size // self.window
        return x.view(-1, s, s, w, w, x.shape[-1]).transpose(2, 3).reshape(-1, self.size, self.size, x.shape[-1])

    def forward(self, x):
        y = torch.roll(self.norm1(x), (-self.shift, -self.shift), (1, 2))
        y = self.whole(self.attn(self.windows(y), self.seen))
        x = x + torch.roll(y, (self.shift, self.shift), (1, 2))
        return x + self.mlp(self.norm2(x))


class Merging(nn.Module):
    """Four neighbours become one of twice the width."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * width), nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x):
        x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
        return self.reduction(self.norm(x))


class Swin(nn.Module):
    def __init__(self, width=32, heads=4, depths=(2, 2), size=8, window=4):
        super().__init__()
        self.embed = nn.Conv2d(3, width, 4, 4)
        layers = []
        for stage, depth in enumerate(depths):
            if stage:
                layers.append(Merging(width))
                width, heads, size = 2 * width, 2 * heads, size // 2
            for place in range(depth):
                shift = window // 2 if place % 2 and size > window else 0
                layers.append(SwinBlock(width, heads, size, window, shift))
        self.layers, self.norm, self.head = nn.Sequential(*layers), nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x):
        x = self.layers(self.embed(x).permute(0, 2, 3, 1))
        return self.head(self.norm(x).mean((1, 2)))


class LayerNorm2d(nn.LayerNorm):
    """Over the channels of a map."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """A wide depthwise convolution, an MLP at every place, a factor for every channel."""

    def __init__(self, width):
        super().__init__()
        self.conv_dw, self.norm = nn.Conv2d(width, width, 7, padding=3, groups=width), nn.LayerNorm(width)
        self.mlp, self.gamma = Mlp(width, 4 * width), nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, x):
        y = self.mlp(self.norm(self.conv_dw(x).permute(0, 2, 3, 1)))
        return x + (self.gamma * y).permute(0, 3, 1, 2)


def convnext(width=16, depths=(1, 2, 1)):
    layers = [nn.Conv2d(3, width, 4, 4), LayerNorm2d(width)]
    for stage, depth in enumerate(depths):
        if stage:
            layers += [LayerNorm2d(width), nn.Conv2d(width, 2 * width, 2, 2)]
            width *= 2
        layers += [ConvNeXtBlock(width) for _ in range(depth)]
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(width), nn.Linear(width, 10)
    return nn.Sequential(*layers, *head)


def mlp(width=40):
    layers = []
    for i, norm in ((12, nn.BatchNorm1d), (width, nn.LayerNorm), (width, nn.RMSNorm)):
        layers += [nn.Linear(i, width), norm(width), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


class Gated(nn.Module):
    """Gated linear units over channels and over rows, as in convolutional language models and SwiGLU."""

    def __init__(self, width=16):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 2 * width, 3), nn.Conv2d(width, 2 * width, 3, padding=1)
        self.third, self.unit, self.head = nn.Linear(width, 2 * width), nn.GLU(), nn.Linear(width, 10)

    def forward(self, x):
        x = F.glu(self.second(F.glu(self.first(x), 1)), 1).mean(2).transpose(1, 2)
        return self.head(self.unit(self.third(x)).mean(1))

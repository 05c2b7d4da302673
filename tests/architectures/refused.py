"""What cannot be shrunk right: GroupNorm, shuffled channels, recurrent layers, PixelShuffle; and a detector's heads."""

import torch
import torch.nn.functional as F
from torch import nn

from .convolutional import Added, Pooled, conv


class GroupNormed(nn.Module):
    """Residual blocks with GroupNorm, after a part without."""

    def __init__(self, width=16):
        super().__init__()
        self.stem = nn.Sequential(conv(3, width), conv(width, width))
        self.first, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(4, width)
        self.second, self.head = conv(width, width), Pooled(width)

    def forward(self, x):
        x = self.stem(x)
        return self.head(x + self.second(F.relu(self.norm(self.first(x)))))


class Shuffled(nn.Module):
    """Of ShuffleNet: the channels of the groups are mixed between two grouped convolutions."""

    def __init__(self, i, groups=4):
        super().__init__()
        self.first, self.groups = conv(i, i, 1, groups=groups), groups
        self.depthwise, self.last = conv(i, i, groups=i, act=nn.Identity), conv(i, i, 1, groups=groups, act=nn.Identity)

    def forward(self, x):
        y = self.first(x)
        n, c, h, w = y.shape
        y = y.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)
        return F.relu(x + self.last(self.depthwise(y)))


def shufflenet(width=16):
    return nn.Sequential(conv(3, width, 3, 2), Shuffled(width), Shuffled(width), conv(width, 32, 1), Pooled(32))


class Reader(nn.Module):
    """Columns of a map, one after the other, through an LSTM, as those that read text in pictures."""

    def __init__(self, width=16):
        super().__init__()
        self.features = nn.Sequential(conv(3, width), conv(width, width, 3, 2))
        self.lstm, self.head = nn.LSTM(width, 12, batch_first=True, bidirectional=True), nn.Linear(24, 10)

    def forward(self, x):
        return self.head(self.lstm(self.features(x).mean(2).transpose(1, 2))[0])


class SuperResolution(nn.Module):
    """ESPCN: the last convolution's channels become places."""

    def __init__(self, width=16, times=2):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, width, 5, padding=2), nn.Conv2d(width, width, 3, padding=1)
        self.wide, self.shuffle = nn.Conv2d(width, width * times**2, 3, padding=1), nn.PixelShuffle(times)
        self.last = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x):
        return self.last(self.shuffle(F.relu(self.wide(F.relu(self.second(F.relu(self.first(x))))))))


class Encoder(nn.Module):
    """As in torchvision's ViT: attention by torch, an MLP in a Sequential."""

    def __init__(self, width=16, heads=4):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


def encoder():
    return nn.Sequential(nn.Linear(12, 16), Encoder(), Encoder(), nn.Linear(16, 10))


class Detector(nn.Module):
    """RetinaNet: a pyramid of three levels, two towers for all of them, classes and boxes of every anchor."""

    def __init__(self, width=8, anchors=3, classes=4, depth=2):
        super().__init__()
        sizes = (width, 2 * width, 4 * width)
        self.stem = conv(3, width, 3, 2)
        self.stages = nn.ModuleList(
            nn.Sequential(Added(nn.Sequential(conv(i, o, 3, 2), conv(o, o, act=nn.Identity)), i, o, 2), conv(o, o))
            for i, o in zip((width, *sizes), sizes, strict=False)
        )
        self.sides = nn.ModuleList(nn.Conv2d(size, 2 * width, 1) for size in sizes)
        self.smooth = nn.ModuleList(nn.Conv2d(2 * width, 2 * width, 3, padding=1) for _ in sizes)
        self.towers = nn.ModuleList(
            nn.Sequential(*(conv(2 * width, 2 * width) for _ in range(depth))) for _ in range(2)
        )
        self.ends = nn.ModuleList(nn.Conv2d(2 * width, anchors * size, 3, padding=1) for size in (classes, 4))
        self.classes = classes

    def forward(self, x):
        levels, x = [], self.stem(x)
        for stage in self.stages:
            x = stage(x)
            levels.append(x)
        levels = [side(level) for side, level in zip(self.sides, levels, strict=True)]
        for i in (1, 0):
            levels[i] = levels[i] + F.interpolate(levels[i + 1], scale_factor=2)
        found = []
        for tower, end, size in zip(self.towers, self.ends, (self.classes, 4), strict=True):
            rows = []
            for smooth, level in zip(self.smooth, levels, strict=True):
                y = end(tower(smooth(level)))
                n, _, h, w = y.shape
                rows.append(y.view(n, -1, size, h, w).permute(0, 3, 4, 1, 2).reshape(n, -1, size))
            found.append(torch.cat(rows, 1))
        return {"classes": found[0], "boxes": found[1]}

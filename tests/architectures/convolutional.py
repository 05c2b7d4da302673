"""Plain convolutions, ResNet, ResNeXt, VGG, the MobileNets, EfficientNet, DenseNet, U-Net and YOLO's C2f."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn


def conv(i, o, kernel=3, stride=1, groups=1, act=nn.ReLU):
    return nn.Sequential(
        nn.Conv2d(i, o, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(o), act()
    )


class Pooled(nn.Module):
    """Pools and classifies."""

    def __init__(self, width, classes=10):
        super().__init__()
        self.fc = nn.Linear(width, classes)

    def forward(self, x):
        return self.fc(x.mean((2, 3)))


class Added(nn.Module):
    """A block beside a shortcut, a convolution where sizes change."""

    def __init__(self, block, i, o, stride, act=nn.ReLU):
        super().__init__()
        self.block, self.act = block, act()
        self.shortcut = nn.Identity() if i == o and stride == 1 else conv(i, o, 1, stride, act=nn.Identity)

    def forward(self, x):
        return self.act(self.block(x) + self.shortcut(x))


def basic(i, o, stride):
    """Of ResNet-18, -20 and -34."""
    return Added(nn.Sequential(conv(i, o, 3, stride), conv(o, o, act=nn.Identity)), i, o, stride)


def bottleneck(i, o, stride, groups=1, inside=None):
    """Of ResNet-50, and grouped of ResNeXt."""
    middle = inside or o // 4
    layers = conv(i, middle, 1), conv(middle, middle, 3, stride, groups), conv(middle, o, 1, act=nn.Identity)
    return Added(nn.Sequential(*layers), i, o, stride)


def stages(block, stem, widths, depths):
    """Stages of blocks; all but the first begin with a stride of 2."""
    layers, i = [], stem
    for number, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        for place in range(depth):
            layers.append(block(i, width, 2 if place == 0 and number else 1))
            i = width
    return [*layers, Pooled(i)]


def plain(width=12):
    return nn.Sequential(
        conv(3, width), conv(width, 2 * width), nn.MaxPool2d(2), conv(2 * width, 2 * width), Pooled(2 * width)
    )


def resnet20(width=8):
    return nn.Sequential(conv(3, width), *stages(basic, width, (width, 2 * width, 4 * width), (3, 3, 3)))


def resnet50(width=8, depths=(1, 2, 2, 1)):
    widths = [width * 4 * 2**stage for stage in range(4)]
    stem = conv(3, width, 7, 2), nn.MaxPool2d(3, 2, 1)
    return nn.Sequential(*stem, *stages(bottleneck, width, widths, depths))


def resnext50(width=8, depths=(1, 2, 1, 1), groups=4):
    def block(i, o, stride):
        return bottleneck(i, o, stride, groups, o // 2)

    widths = [width * 4 * 2**stage for stage in range(4)]
    stem = conv(3, width, 7, 2), nn.MaxPool2d(3, 2, 1)
    return nn.Sequential(*stem, *stages(block, width, widths, depths))


def vgg(width=8, hidden=24):
    """Its classifier reads the flattened map."""
    layers, i = [], 3
    for times, repeats in ((1, 2), (2, 2), (4, 3)):
        for _ in range(repeats):
            layers.append(conv(i, times * width))
            i = times * width
        layers.append(nn.MaxPool2d(2))
    head = nn.Flatten(), nn.Linear(16 * i, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()
    return nn.Sequential(*layers, *head, nn.Linear(hidden, 10))


def mobilenet_v1(width=16, blocks=((1, 1), (2, 2), (2, 1), (4, 2), (4, 1))):
    layers, i = [conv(3, width, 3, 2)], width
    for times, stride in blocks:
        layers += [conv(i, i, 3, stride, groups=i), conv(i, times * width, 1)]
        i = times * width
    return nn.Sequential(*layers, Pooled(i))


class SqueezeExcite(nn.Module):
    """A factor for every channel from the means of all."""

    def __init__(self, width, squeezed, act, gate):
        super().__init__()
        self.down, self.up = nn.Conv2d(width, squeezed, 1), nn.Conv2d(squeezed, width, 1)
        self.act, self.gate = act(), gate()

    def forward(self, x):
        return x * self.gate(self.up(self.act(self.down(x.mean((2, 3), keepdim=True)))))


class Inverted(nn.Module):
    """Expands, convolves every channel by itself, excites, projects; added to its input where sizes agree."""

    def __init__(self, i, o, stride=1, expand=4, kernel=3, act=nn.ReLU6, excite=None, gate=nn.Sigmoid):
        super().__init__()
        inside = i * expand
        layers = [conv(i, inside, 1, act=act)] if expand > 1 else []
        layers.append(conv(inside, inside, kernel, stride, groups=inside, act=act))
        if excite:
            layers.append(SqueezeExcite(inside, max(inside // 8, 4), excite, gate))
        self.block = nn.Sequential(*layers, conv(inside, o, 1, act=nn.Identity))
        self.added = i == o and stride == 1

    def forward(self, x):
        return x + self.block(x) if self.added else self.block(x)


def mobilenet_v2(width=8, times=1):
    blocks = [Inverted(width, width, expand=1), Inverted(width, 2 * width, 2)]
    blocks += [Inverted(2 * width, 2 * width) for _ in range(times)] + [Inverted(2 * width, 3 * width, 2)]
    blocks += [Inverted(3 * width, 3 * width) for _ in range(times)]
    return nn.Sequential(conv(3, width, 3, 2, act=nn.ReLU6), *blocks, conv(3 * width, 64, 1), Pooled(64))


def mobilenet_v3(width=8, times=1):
    """Hard swish, squeeze-and-excite with hard sigmoid in some blocks, two layers at the end."""
    excited = {"act": nn.Hardswish, "excite": nn.ReLU, "gate": nn.Hardsigmoid, "kernel": 5}
    blocks = [Inverted(width, width, expand=1, act=nn.ReLU, excite=nn.ReLU, gate=nn.Hardsigmoid)]
    blocks += [Inverted(width, 2 * width, 2, 3, act=nn.ReLU), Inverted(2 * width, 3 * width, 2, **excited)]
    blocks += [Inverted(3 * width, 3 * width, **excited) for _ in range(times)]
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 48), nn.Hardswish(), nn.Linear(48, 10)
    ends = conv(3 * width, 64, 1, act=nn.Hardswish)
    return nn.Sequential(conv(3, width, 3, 2, act=nn.Hardswish), *blocks, ends, *head)


def efficientnet(width=8, times=1):
    """SiLU everywhere, squeeze-and-excite in every block."""
    excited = {"act": nn.SiLU, "excite": nn.SiLU}
    blocks = [Inverted(width, width, expand=1, **excited), Inverted(width, 2 * width, 2, 6, **excited)]
    blocks += [Inverted(2 * width, 2 * width, 1, 6, **excited) for _ in range(times)]
    blocks += [Inverted(2 * width, 3 * width, 2, 6, 5, **excited)]
    blocks += [Inverted(3 * width, 3 * width, 1, 6, 5, **excited) for _ in range(times)]
    ends = conv(3 * width, 64, 1, act=nn.SiLU)
    return nn.Sequential(conv(3, width, 3, 2, act=nn.SiLU), *blocks, ends, Pooled(64))


class DenseLayer(nn.Module):
    """Norm and activation before each convolution; its output beside all that was before."""

    def __init__(self, i, growth):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(i), nn.Conv2d(i, 4 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(4 * growth), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x):
        y = self.conv1(F.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(F.relu(self.norm2(y)))], 1)


def densenet(growth=8, depths=(3, 4, 3)):
    i = 2 * growth
    layers = [conv(3, i)]
    for number, depth in enumerate(depths):
        if number:
            layers += [nn.BatchNorm2d(i), nn.ReLU(), nn.Conv2d(i, i // 2, 1, bias=False), nn.AvgPool2d(2)]
            i //= 2
        for _ in range(depth):
            layers.append(DenseLayer(i, growth))
            i += growth
    return nn.Sequential(*layers, nn.BatchNorm2d(i), nn.ReLU(), Pooled(i))


class UNet(nn.Module):
    """Transposed convolutions upwards, every level beside that of the way down; a map comes out."""

    def __init__(self, width=16, depth=2):
        super().__init__()
        sizes = [width * 2**level for level in range(depth + 1)]
        self.first = nn.Sequential(conv(3, width), conv(width, width))
        self.downs = nn.ModuleList(nn.Sequential(nn.MaxPool2d(2), conv(i, o), conv(o, o)) for i, o in pairwise(sizes))
        self.ups = nn.ModuleList(nn.ConvTranspose2d(2 * o, o, 2, 2) for o in sizes[-2::-1])
        self.joins = nn.ModuleList(nn.Sequential(conv(2 * o, o), conv(o, o)) for o in sizes[-2::-1])
        self.last = nn.Conv2d(width, 5, 1)

    def forward(self, x):
        levels = [self.first(x)]
        for down in self.downs:
            levels.append(down(levels[-1]))
        x = levels.pop()
        for up, join in zip(self.ups, self.joins, strict=True):
            x = join(torch.cat([levels.pop(), up(x)], 1))
        return self.last(x)


class C2f(nn.Module):
    """Of YOLO v8: halves of a convolution's output, the second through residual blocks, all of them side by side."""

    def __init__(self, i, o, depth):
        super().__init__()
        self.first, self.last = conv(i, o, 1, act=nn.SiLU), conv((2 + depth) * o // 2, o, 1, act=nn.SiLU)
        half = o // 2
        self.blocks = nn.ModuleList(
            Added(nn.Sequential(conv(half, half), conv(half, half)), half, half, 1, nn.Identity) for _ in range(depth)
        )

    def forward(self, x):
        parts = list(self.first(x).chunk(2, 1))
        for block in self.blocks:
            parts.append(block(parts[-1]))
        return self.last(torch.cat(parts, 1))


def yolo(width=16, depth=2):
    blocks = C2f(width, width, depth), conv(width, 2 * width, 3, 2), C2f(2 * width, 2 * width, depth)
    return nn.Sequential(conv(3, width, 3, 2), *blocks, Pooled(2 * width))

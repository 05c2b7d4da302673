"""Small nets whose channels are coupled in the ways that structured pruning meets, and some that cannot be shrunk."""

import torch
import torch.nn.functional as F
from torch import nn


def conv(i, o, k=3, **options):
    return nn.Sequential(nn.Conv2d(i, o, k, padding=k // 2, bias=False, **options), nn.BatchNorm2d(o), nn.ReLU())


class Head(nn.Module):
    """Pools, and classifies."""

    def __init__(self, width, classes=4):
        super().__init__()
        self.fc = nn.Linear(width, classes)

    def forward(self, x):
        return self.fc(x.mean((2, 3)))


class Residual(nn.Module):
    """The stem and the last convolution of the block are added."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.a = nn.Conv2d(8, 6, 3, padding=1, bias=False)
        self.b = nn.Conv2d(6, 8, 3, padding=1)
        self.head = Head(8)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        return self.head(x + self.b(F.relu(self.a(x))))


class SqueezeExcite(nn.Module):
    """An inverted residual with squeeze-and-excite, as in MobileNet v3."""

    def __init__(self):
        super().__init__()
        self.stem = conv(3, 8)
        self.expand, self.depthwise = conv(8, 16, 1), conv(16, 16, groups=16)
        self.down, self.up = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.project = nn.Conv2d(16, 8, 1)
        self.head = Head(8)

    def forward(self, x):
        x = self.stem(x)
        y = self.depthwise(self.expand(x))
        y = y * torch.sigmoid(self.up(F.relu(self.down(y.mean((2, 3), keepdim=True)))))
        return self.head(x + self.project(y))


class Dense(nn.Module):
    """Concatenations of concatenations, one of them twice of the same."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv(3, 5), conv(5, 4), conv(9, 6, 1)
        self.head = Head(12)

    def forward(self, x):
        x = self.a(x)
        x = self.c(torch.cat([x, self.b(x)], 1))
        return self.head(torch.cat([x, x], 1))


class UNet(nn.Module):
    """A transposed convolution beside a skip."""

    def __init__(self):
        super().__init__()
        self.down, self.bottom, self.up = conv(3, 6), conv(6, 8), nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.join, self.out = conv(12, 6), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        x = self.down(x)
        y = self.up(self.bottom(F.max_pool2d(x, 2)))
        return self.out(self.join(torch.cat([x, y], 1)))


class Chunked(nn.Module):
    """Halves that are used apart (YOLO's C2f), and halves that are added to one another."""

    def __init__(self, added):
        super().__init__()
        self.added = added
        self.a, self.b = conv(3, 8), conv(4, 4)
        self.head = Head(4 if added else 12)

    def forward(self, x):
        parts = list(self.a(x).chunk(2, 1))
        if self.added:
            return self.head(parts[0] + self.b(parts[1]))
        parts.append(self.b(parts[-1]))
        return self.head(torch.cat(parts, 1))


class Shared(nn.Module):
    """One block called twice, and a residual on what goes into the model."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 3, 3, padding=1)
        self.c, self.d = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = Head(8)

    def forward(self, x):
        x = x + self.b(F.relu(self.a(x)))
        x = F.relu(self.c(x))
        return self.head(self.d(F.relu(self.d(x))))


class Scaled(nn.Module):
    """A ConvNeXt-like block: depthwise, LayerNorm over channels, an MLP, and a parameter that scales channels."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.gamma = nn.Parameter(torch.rand(8) + 0.5)
        self.head = Head(8)

    def forward(self, x):
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.gamma * self.down(F.gelu(self.up(y)))
        return self.head(x + y.permute(0, 3, 1, 2))


def mobilenet():
    layers = [conv(3, 8), conv(8, 8, groups=8), conv(8, 12, 1), conv(12, 24, groups=12), conv(24, 10, 1)]
    return nn.Sequential(*layers, Head(10))


def plain():
    return nn.Sequential(conv(3, 8), conv(8, 6), nn.MaxPool2d(2), conv(6, 7), Head(7))


def flatten():
    return nn.Sequential(
        conv(3, 6), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(54, 10), nn.ReLU(), nn.Linear(10, 4)
    )


def grouped(groups):
    return nn.Sequential(conv(3, 16), conv(16, 24, groups=groups), conv(24, 8, 1), Head(8))


def mlp():
    norms = [nn.BatchNorm1d(16), nn.LayerNorm(12), nn.RMSNorm(10)]
    layers = []
    for (i, o), norm in zip([(9, 16), (16, 12), (12, 10)], norms, strict=True):
        layers += [nn.Linear(i, o), norm, nn.GELU() if o == 12 else nn.PReLU(o)]
    return nn.Sequential(*layers, nn.Linear(10, 4))


def signal():
    return nn.Sequential(
        nn.Conv1d(2, 6, 3), nn.InstanceNorm1d(6), nn.ReLU(), nn.ConvTranspose1d(6, 8, 3, groups=2), nn.Conv1d(8, 5, 1),
        nn.BatchNorm1d(5, affine=False), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(5, 3),
    )  # fmt: skip


IMAGE, ROW, SIGNAL = (2, 3, 8, 8), (3, 9), (2, 2, 12)

NETS = {
    "plain": (plain, IMAGE),
    "residual": (Residual, IMAGE),
    "mobilenet": (mobilenet, IMAGE),
    "squeeze-excite": (SqueezeExcite, IMAGE),
    "concat": (Dense, IMAGE),
    "unet": (UNet, IMAGE),
    "flatten": (flatten, IMAGE),
    "many groups": (lambda: grouped(8), IMAGE),
    "two groups": (lambda: grouped(2), IMAGE),
    "chunk": (lambda: Chunked(False), IMAGE),
    "chunk added": (lambda: Chunked(True), IMAGE),
    "shared": (Shared, IMAGE),
    "convnext": (Scaled, IMAGE),
    "mlp": (mlp, ROW),
    "signal": (signal, SIGNAL),
}


def make(name):
    """(net in eval mode, an input); norms and their statistics are far from where they start."""
    factory, shape = NETS[name]
    net = factory()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase | nn.LayerNorm | nn.RMSNorm):
                for key, tensor in module.state_dict().items():
                    if tensor.is_floating_point():
                        tensor.uniform_(0.5, 1.5) if key in ("weight", "running_var") else tensor.normal_(0, 0.3)
    return net.eval(), torch.randn(shape)

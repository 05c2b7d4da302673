"""The demo's task: scikit-learn's handwritten digits, and a small residual network trained on them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from ..utils.extras import require

TRAINING_BATCH = 128
PRUNING_BATCH = 64  # of SFPK and SNIP; at 128 the searches end at the same accuracy and take a third longer
TEST_IMAGES = 450


@dataclass(frozen=True)
class Digits:
    """1,797 real 8 × 8 images, split once and for all; the test images are used for accuracy alone."""

    train_x: Tensor  # (1347, 1, 8, 8) in [0, 1]
    train_y: Tensor  # (1347,)
    test_x: Tensor  # (450, 1, 8, 8)
    test_y: Tensor  # (450,)

    def loader(self, seed: int, batch: int = PRUNING_BATCH) -> DataLoader:
        """Shuffled mini-batches of the training images, in an order fixed by ``seed``."""
        generator = torch.Generator().manual_seed(seed)
        return DataLoader(
            TensorDataset(self.train_x, self.train_y), batch, shuffle=True, drop_last=True, generator=generator
        )


def load_digits() -> Digits:
    """The digits, from the copy that scikit-learn ships."""
    require("the digits' data set", "sklearn")
    from sklearn.datasets import load_digits as sklearn_digits
    from sklearn.model_selection import train_test_split

    images, labels = sklearn_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels, test_size=TEST_IMAGES, random_state=0, stratify=labels
    )

    def as_images(flat: object) -> Tensor:
        return torch.as_tensor(flat, dtype=torch.float32).div(16).view(-1, 1, 8, 8)

    return Digits(as_images(train_x), torch.as_tensor(train_y), as_images(test_x), torch.as_tensor(test_y))


class ResidualBlock(nn.Module):
    """Two 3 × 3 convolutions with batch-norm, and a shortcut (1 × 1 convolution where the shape changes)."""

    def __init__(self, channels_in: int, channels_out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Shape (batch, channels_in, h, w) → (batch, channels_out, h / stride, w / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def build_model() -> nn.Module:
    """A residual network with 77 k prunable weights, for 8 × 8 images and ten classes."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        ResidualBlock(16, 16, 1),
        ResidualBlock(16, 32, 2),
        ResidualBlock(32, 64, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def train(digits: Digits, seed: int, epochs: int) -> nn.Module:
    """A model trained with SGD, Nesterov momentum and a one-cycle learning rate; in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model()
    loader = digits.loader(seed, TRAINING_BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=epochs * len(loader))
    model.train()
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            scheduler.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits) -> float:
    """Share of the test images classified correctly, in [0, 1]."""
    return float((model(digits.test_x).argmax(dim=1) == digits.test_y).float().mean())

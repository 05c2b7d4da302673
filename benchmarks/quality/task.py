"""What a mask is judged on: a trained network, batches to prune it with, held-out data to measure it with."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sfpk_kernels.modeling.batches import default_loss
from sfpk_kernels.utils.files import atomic_write

Batch = Any
LossFn = Callable[[nn.Module, Batch], Tensor]

KEPT = Path(__file__).with_name("networks")  # those the rows were measured on: the same ones on every machine
FOLDER = Path(os.environ.get("SFPK_QUALITY", ".quality"))  # trained here: others of a seed, rounding differs


@dataclass(frozen=True)
class Problem:
    """A network of one seed."""

    model: nn.Module  # dense, trained, in eval mode
    loss_fn: LossFn | None
    batches: Callable[[int], Iterator[Batch]]  # of a seed: without end, each sample equally often
    measure: Callable[[nn.Module], float]  # on held-out data, of a model that may be changed (batch-norm is)
    options: dict[str, Any] = field(default_factory=dict)  # of Coordinates


@dataclass(frozen=True)
class Task:
    """A network family on fixed data."""

    name: str
    title: str
    metric: str  # what measure() gives
    higher: bool  # whether more is better
    unit: float  # one standard error of the held-out data, roughly: differences below are noise
    build: Callable[[int], Problem]  # of a seed
    sparsities: tuple[float, ...]
    kept_out: bool = False  # of every choice of a default
    rate: float = 1e-3  # learning rate of Adam at its peak, of fine-tuning under a mask
    transformer: bool = False
    linear: bool = False  # its prunable layers are Linear, an embedding of patches aside
    sloped: bool = True  # the loss has a gradient at the dense weights (a distance to the dense outputs has none)

    @property
    def telling(self) -> float:
        """The sparsity to show where there is room for one: the last but one."""
        return self.sparsities[-2]


def trained(name: str, make: Callable[[], nn.Module], train: Callable[[nn.Module], None], recipe: str) -> nn.Module:
    """A network trained once and kept on disk, by name and recipe (data and settings in words); in eval mode."""
    file = f"{name}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}.safetensors"
    model = make()
    for path in (KEPT / file, FOLDER / file):
        if path.exists():
            model.load_state_dict(load_file(path))
            return model.eval()
    model.train()
    train(model)
    FOLDER.mkdir(parents=True, exist_ok=True)
    with atomic_write(FOLDER / file) as temporary:
        save_file(model.state_dict(), temporary)
    return model.eval()


def shuffled(
    tensors: tuple[Tensor, ...],  # samples in their first dimension
    size: int,
    seed: int,
) -> Iterator[tuple[Tensor, ...]]:
    """Mini-batches without end: every epoch in a new order, the last short batch left out."""
    generator = torch.Generator().manual_seed(seed)
    count = tensors[0].shape[0]
    while True:
        order = torch.randperm(count, generator=generator)
        for begin in range(0, count - size + 1, size):
            rows = order[begin : begin + size]
            yield tuple(tensor[rows] for tensor in tensors)


def seeded_model(seed: int, make: Callable[[], nn.Module]) -> nn.Module:
    """A network whose initial weights are those of a seed; the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def fit(
    model: nn.Module,
    loss_fn: LossFn | None,  # None: the default loss
    batches: Iterator[Batch],
    steps: int,
    optimizer: torch.optim.Optimizer,
    peak: float,
) -> None:
    """Train with a one-cycle learning rate."""
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=peak, total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        (loss_fn or default_loss)(model, next(batches)).backward()
        optimizer.step()
        scheduler.step()

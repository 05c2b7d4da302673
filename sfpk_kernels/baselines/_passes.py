"""Forward and backward passes of baselines: batches, and gradients at masked weights, looked at before they count."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..coordinates.flat import Coordinates
from ..modeling.batches import default_loss, move_to
from ..modeling.state import check_no_inference_tensors, guarded
from ..search.energy import LossFn, ParticleEnergy
from ..search.energy.sequential import OneByOne
from ..utils.arguments import check_least, check_loader, check_loss_fn


def check_data(loader: Any, loss_fn: Any, max_batches: Any = None) -> None:
    """What can be said of loader, loss and the number of batches before anything runs."""
    check_loader(loader)
    check_loss_fn(loss_fn)
    if max_batches is not None:
        check_least("max_batches", max_batches, 1, " or None")


def batches(loader: Iterable[Any], max_batches: int | None, device: torch.device) -> Iterator[Any]:
    """One pass over the loader, or its first batches.

    Raises:
        ValueError: there is none.
    """
    empty = True
    for batch in islice(loader, max_batches):
        empty = False
        yield move_to(batch, device)
    if empty:
        raise ValueError("loader: wanted batches, got an empty iterable")


class Gradients:
    """∂L/∂W of a model at W = P ⊙ θ; only inside :func:`gradients`."""

    def __init__(self, energy: ParticleEnergy):
        self._energy = energy
        self._passes = 0

    def __call__(
        self,
        keep: Tensor,  # (d,) bool
        batch: Any,
    ) -> Tensor:  # (d,), written again by the next call
        """Of one batch. Removed weights have one, too.

        Raises:
            FloatingPointError: a loss or gradient that is not finite.
        """
        losses, grads = self._energy(keep.unsqueeze(0), [batch])
        for what, values in (("loss", losses), ("gradient", grads)):
            if not bool(torch.isfinite(values).all()):
                got = f"{float(losses[0])}" if what == "loss" else "another"
                raise FloatingPointError(f"loss_fn: wanted a finite {what}, got {got} in batch {self._passes}")
        self._passes += 1
        return grads[0]


@contextmanager
def stood_in(
    model: nn.Module,
    loss_fn: LossFn | None,
    coordinates: Coordinates,
    theta: Tensor,  # (d,)
) -> Iterator[OneByOne]:
    """The model with stand-ins that hold θ, its ``leaves``, in the mode of :func:`gradients`."""
    check_no_inference_tensors(model)
    energy = ParticleEnergy(model, loss_fn or default_loss, coordinates, theta, mode="sequential")
    runner = OneByOne(energy.problem, energy.scale)
    with guarded(model, bn="batch", training=False), runner.ready():
        runner.load_dense()
        yield runner


@contextmanager
def gradients(
    model: nn.Module,
    loss_fn: LossFn | None,
    coordinates: Coordinates,
    theta: Tensor,  # (d,)
) -> Iterator[Gradients]:
    """The model ready for passes, in the mode of SFPK's energies: eval, but batch-norm on the batch's statistics."""
    check_no_inference_tensors(model)
    energy = ParticleEnergy(model, loss_fn or default_loss, coordinates, theta, mode="sequential")
    with guarded(model, bn="batch", training=False):
        yield Gradients(energy)

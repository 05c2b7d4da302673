"""What every way of computing energies shares: model, loss, coordinates, precision, micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...coordinates.flat import Coordinates

LossFn = Callable[[nn.Module, Any], Tensor]

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class CannotRunError(RuntimeError):
    """This way of computing energies cannot run this model; the message says why."""


@dataclass(frozen=True)
class Problem:
    """The fixed part of all energies of a run."""

    model: nn.Module
    loss_fn: LossFn
    coordinates: Coordinates
    theta: Tensor  # (d,) where the particles are
    backend: str | None = None  # of the masked-weights op
    precision: str | None = None  # a key of AUTOCAST
    microbatch: int | None = None  # samples
    compiled: bool = False

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return self.coordinates.device

    @property
    def dtypes(self) -> list[torch.dtype]:
        """Of the prunable tensors."""
        return [parameter.dtype for parameter in self.coordinates.parameters(self.model)]

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of the forward pass; the backward pass follows it."""
        if self.precision is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=AUTOCAST[self.precision])

    def checked(self, loss_fn: LossFn, batch: Any) -> Tensor:
        """The loss of the model with whatever weights it has now, as a 0-d tensor."""
        return as_scalar(loss_fn(self.model, batch))

    def parts(self, batch: Any) -> Iterator[tuple[Any, float]]:
        """The batch in micro-batches, each with its share of the samples."""
        if self.microbatch is None:
            yield batch, 1.0
        else:
            yield from split_batch(batch, self.microbatch)


def as_scalar(loss: Any) -> Tensor:
    """The loss as a 0-d tensor.

    Raises:
        TypeError, ValueError: it is no tensor of one element.
    """
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn: wanted a scalar tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"loss_fn: wanted a scalar tensor, got shape {tuple(loss.shape)}")
    return loss.reshape(())


def split_batch(batch: Any, size: int) -> Iterator[tuple[Any, float]]:
    """Micro-batches of up to ``size`` samples, each with its share of all samples.

    Every tensor whose first dimension is that of the batch's first tensor is cut along it; the rest goes along whole.

    Raises:
        ValueError: no tensor with a first dimension.
    """
    leaves, spec = pytree.tree_flatten(batch)
    samples = next((leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() > 0), None)
    if not samples:
        raise ValueError("microbatch: wanted a batch whose tensors have samples in their first dimension, got none")
    for begin in range(0, samples, size):
        end = min(begin + size, samples)
        cut = [
            leaf[begin:end] if isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == samples else leaf
            for leaf in leaves
        ]
        yield pytree.tree_unflatten(cut, spec), (end - begin) / samples

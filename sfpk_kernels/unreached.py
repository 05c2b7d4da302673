"""Weights that no gradient reaches: behind ``torch.no_grad()``, in unused heads, used through copies made before.

Looked at in the first step, where every weight is kept. Without a gradient nothing tells how important they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .coordinates import Coordinates, PrunableTensor

_NAMED = 8  # tensors, in one message


class Reached:
    """Which prunable tensors had a gradient other than zero for any particle; waits for nothing."""

    def __init__(self, coordinates: Coordinates):
        self._tensors = coordinates.tensors
        self.flags: Tensor | None = None  # (tensors,) bool, where the gradients are

    def see(self, grads: Tensor) -> None:  # (rows, d)
        """Gradients of some particles; one that is not a number counts."""
        seen = torch.stack([grads[:, t.offset : t.offset + t.numel].any() for t in self._tensors])
        self.flags = seen if self.flags is None else self.flags | seen

    def none(self) -> Tensor:  # 0-d bool
        """Whether none of those seen had one."""
        assert self.flags is not None
        return self.flags.any().logical_not()


class NoGradientError(ValueError):
    """No weight has a gradient.

    Attributes:
        moved: how many particles have moved, where they go one after the other.
    """

    def __init__(self, where: str, moved: int = 0):
        super().__init__(
            "loss_fn: wanted a loss that changes with the prunable weights, got gradients of zero for every weight and "
            f"{where}: is it constant, as for a model of one class or targets that are all ignored, or does "
            "the model run under torch.no_grad() or detach what it computes?"
        )
        self.moved = moved


def unreached(
    flags: Sequence[float] | None,  # as read; None in steps where nobody looked
    tensors: Sequence[PrunableTensor],
    n: int,  # particles
) -> list[str]:
    """Names of the tensors without a gradient, in order.

    Raises:
        NoGradientError: not one has a gradient.
    """
    missing = [tensor.name for tensor, seen in zip(tensors, flags or [], strict=flags is not None) if not seen]
    if len(missing) == len(tensors):
        raise NoGradientError("particle in step 1", moved=n)
    return missing


def in_words(names: Sequence[str]) -> str:
    """What is wrong and what to do, for an alarm."""
    shown = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
    return (
        f"no gradient reaches {shown}: zero for every particle, so nothing tells which of these weights matter. They "
        "may lie behind torch.no_grad(), in a part that this loss_fn or mode of the model (model_mode) does not use, "
        "or be used through copies; leave them out with ignored_layers"
    )

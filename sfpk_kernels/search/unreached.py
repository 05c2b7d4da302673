"""Weights that no gradient reaches: behind ``torch.no_grad()``, in unused heads, used through copies made before.

Looked at in the first step, where every weight is kept: without a gradient nothing tells how important they are. A loss
that measures how far the outputs are from those of the dense model is flat there; then the second step is looked at.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..coordinates.flat import Coordinates

_NAMED = 8  # tensors, in one message


class Reached:
    """Which prunable tensors had a gradient other than zero for any particle; waits for nothing.

    Args:
        coordinates: the tensors.
        needed: whether at least one must have.
    """

    def __init__(self, coordinates: Coordinates, needed: bool):
        self._tensors = coordinates.tensors
        self.needed = needed
        self.flags: Tensor | None = None  # (tensors,) bool, where the gradients are

    def observe(self, grads: Tensor) -> None:  # (rows, d)
        """Gradients of some particles; one that is not a number counts."""
        seen = torch.stack([grads[:, t.offset : t.offset + t.numel].any() for t in self._tensors])
        self.flags = seen if self.flags is None else self.flags | seen

    def refused(self) -> Tensor:  # 0-d bool
        """Whether none of those seen had one, and one must."""
        assert self.flags is not None
        return self.flags.any().logical_not() & self.needed

    def missing(self, flags: Sequence[float], step: int) -> list[str]:
        """Names of the tensors without a gradient, in order; none where all are without, and need not be.

        Args:
            flags: :attr:`flags`, as read.
            step: for the message.

        Raises:
            NoGradientError: all are without.
        """
        missing = [tensor.name for tensor, seen in zip(self._tensors, flags, strict=True) if not seen]
        if len(missing) < len(flags):
            return missing
        if self.needed:
            raise NoGradientError(f"particle in step {step}")
        return []


class NoGradientError(ValueError):
    """No weight has a gradient."""

    def __init__(self, where: str):
        super().__init__(
            "loss_fn: wanted a loss that changes with the prunable weights, got gradients of zero for every weight and "
            f"{where}: is it constant, as for a model of one class or targets that are all ignored, or does the model "
            "run under torch.no_grad() or detach what it computes?"
        )


def no_gradient_words(names: Sequence[str]) -> str:
    """What is wrong and what to do, for an alarm."""
    shown = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
    return (
        f"no gradient reaches {shown}: zero for every particle, so nothing tells which of these weights matter. They "
        "may lie behind torch.no_grad(), in a part that this loss_fn or mode of the model (model_mode) does not use, "
        "or be used through copies; leave them out with ignored_layers"
    )

"""Masks along the way: one trajectory passes every sparsity below its last."""

from __future__ import annotations

import numbers
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from .masks import MaskSet


@dataclass(frozen=True)
class Waypoint:
    """The mask taken when the schedule passed a sparsity."""

    sparsity: float
    step: int  # after which it was taken
    mask: MaskSet  # exactly round((1 - sparsity)·d) weights, one bit each
    score: Tensor | None  # (d,) the vote behind it, on the CPU, where kept


def sparsities(
    wanted: Iterable[float],
    first: float,  # sparsity at the start of the run
    last: float,  # its target
) -> list[float]:
    """Those of ``checkpoints``, in order, each once.

    Raises:
        TypeError: no iterable of numbers.
        ValueError: one that the run does not pass.
    """
    if isinstance(wanted, str) or not isinstance(wanted, Iterable):
        raise TypeError(f"checkpoints: wanted a list of sparsities, got {wanted!r}")
    values = list(wanted)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"checkpoints: wanted sparsities, got {value!r}")
        if not first < value <= last:
            raise ValueError(
                f"checkpoints: wanted sparsities above {first:g} and up to the run's {last:g}, got {value!r}"
            )
    return sorted({float(value) for value in values})

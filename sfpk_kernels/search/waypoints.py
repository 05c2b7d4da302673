"""Masks along the way: one trajectory passes every sparsity below its last."""

from __future__ import annotations

import numbers
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from ..config import SFPKConfig
from ..masks.maskset import MaskSet


@dataclass(frozen=True)
class Waypoint:
    """The mask taken when the schedule passed a sparsity."""

    sparsity: float
    step: int  # after which it was taken
    mask: MaskSet  # exactly round((1 - sparsity)·d) weights, one bit each
    score: Tensor | None  # (d,) the vote behind it, on the CPU, where kept


def check_waypoints(
    wanted: Iterable[float],
    config: SFPKConfig,
    first: float = 0.0,  # sparsity at the start of the run
    keep_scores: bool = False,
) -> list[float]:
    """Those of ``waypoints``, in order, each once.

    Raises:
        TypeError: no iterable of numbers.
        ValueError: one that the run does not pass, or what does not go together with ``config`` and ``keep_scores``.
    """
    if isinstance(wanted, str) or not isinstance(wanted, Iterable):
        raise TypeError(f"waypoints: wanted a list of sparsities, got {wanted!r}")
    values, last = list(wanted), config.sparsity
    for value in values:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"waypoints: wanted sparsities, got {value!r}")
        if not first < value <= last:
            raise ValueError(
                f"waypoints: wanted sparsities above {first:g} and up to the run's {last:g}, got {value!r}"
            )
    found = sorted({float(value) for value in values})
    early = [value for value in found if value < last]
    if keep_scores and not found:
        raise ValueError("keep_scores: wanted waypoints=[…] beside it, at which scores are kept, got none")
    if config.vote == "masked" and (early or keep_scores):
        what = f"waypoints: wanted none below {last:g}, got {early[0]:g}" if early else "keep_scores: wanted False"
        raise ValueError(f"{what}: the scores of vote='masked' are of the final sparsity alone")
    if config.settle and not found:
        raise ValueError("settle: wanted waypoints=[…] to settle at, got none")
    if config.settle and len(early) + 1 > config.n_steps:
        raise ValueError(
            f"n_steps: wanted ≥ {len(early) + 1} to settle at {len(early)} waypoints and the end, got {config.n_steps}"
        )
    return found

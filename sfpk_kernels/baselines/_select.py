"""From a score per weight to a mask: the one selection rule of all baselines."""

from __future__ import annotations

import numbers

from torch import Tensor

from ..coordinates.flat import Coordinates
from ..masks.maskset import MaskSet
from ..ops import topk_mask
from ..search.polarizer import budget


def check_sparsity(sparsity: float) -> None:
    """``sparsity`` is a number in (0, 1)."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, numbers.Real):
        raise TypeError(f"sparsity: wanted a number in (0, 1), got {sparsity!r}")
    if not 0 < sparsity < 1:
        raise ValueError(f"sparsity: wanted a number in (0, 1), got {sparsity!r}")


def select(
    coordinates: Coordinates,
    score: Tensor,  # (d,)
    sparsity: float,
) -> MaskSet:
    """Exactly the round((1 - sparsity)·d) best coordinates, ties to the lower index."""
    check_sparsity(sparsity)
    mask = topk_mask(score, budget(float(sparsity), coordinates.d))
    return MaskSet.from_flat(mask, coordinates)

"""From a score per weight to a mask: how the kept weights are spread over the tensors, and which rule picks them."""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..coordinates.flat import Coordinates
from ..coordinates.pattern import check_divides, pattern_mask
from ..masks.maskset import MaskSet
from ..ops import topk_mask
from ..search.polarizer import budget

ALLOCATIONS = ("global", "uniform", "erk", "lamp")


def check_sparsity(sparsity: float) -> None:
    """``sparsity`` is a number in (0, 1)."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, numbers.Real):
        raise TypeError(f"sparsity: wanted a number in (0, 1), got {sparsity!r}")
    if not 0 < sparsity < 1:
        raise ValueError(f"sparsity: wanted a number in (0, 1), got {sparsity!r}")


def check_allocation(allocation: Any, among: Sequence[str] = ALLOCATIONS) -> None:
    """``allocation`` is one of those that a method takes."""
    if allocation not in among:
        raise ValueError(f"allocation: wanted one of {', '.join(among)}, got {allocation!r}")


def select(
    coordinates: Coordinates,
    score: Tensor,  # (d,)
    sparsity: float,
    allocation: str = "global",
) -> MaskSet:
    """Exactly the round((1 - sparsity)·d) best coordinates, ties to the lower index.

    Args:
        coordinates: the tensors.
        score: the higher, the sooner kept.
        sparsity: fraction removed, in (0, 1).
        allocation: ``"global"``: the best of all tensors together. ``"uniform"``, ``"erk"``: the best of each tensor,
            as many as :func:`allocated` says. ``"lamp"``: the best of all together by their :func:`lamp` score, for
            scores ≥ 0.

    Raises:
        TypeError, ValueError: a sparsity or an allocation that is none, a score that is NaN, or negative with
            ``"lamp"``.
    """
    check_sparsity(sparsity)
    check_allocation(allocation)
    k = budget(float(sparsity), coordinates.d)
    if allocation in ("global", "lamp"):
        score = lamp(coordinates, score) if allocation == "lamp" else score
        mask = topk_mask(score, k, backend=backend_of(score))
    else:
        counts = allocated(coordinates, sparsity, allocation)
        borders = [0, *itertools.accumulate(coordinates.segments)]
        mask = topk_mask(score, k, segments=borders, min_keep=counts, max_keep=counts, backend=backend_of(score))
    return MaskSet.from_flat(mask, coordinates)


def backend_of(score: Tensor) -> str | None:
    """Of the selection: the one for fp64 scores, else the fastest."""
    return "reference" if score.dtype == torch.float64 else None


def select_pattern(
    coordinates: Coordinates,
    score: Tensor,  # (d,)
    pattern: tuple[int, int],
) -> MaskSet:
    """N:M sparsity: of every M consecutive weights along the inputs the N best, ties to the lower index.

    Args:
        coordinates: the tensors.
        score: the higher, the sooner kept.
        pattern: (N, M), such as (2, 4).

    Raises:
        ValueError: a tensor without inputs, or whose number of them M does not divide.
    """
    check_divides(coordinates.tensors, pattern)
    return MaskSet.from_flat(pattern_mask(coordinates, score, pattern), coordinates)


def allocated(coordinates: Coordinates, sparsity: float, allocation: str) -> list[int]:
    """How many weights each tensor (of experts each matrix) keeps under ``"uniform"`` or ``"erk"``: in all
    round((1 - sparsity)·d).

    The densities times the sizes are rounded by largest remainder, equal remainders up for the earlier tensor.
    """
    total = budget(float(sparsity), coordinates.d)
    if allocation == "erk":
        shares = erk([shape for tensor in coordinates.tensors for shape in tensor.segments], total)
    else:
        shares = [total / coordinates.d * size for size in coordinates.segments]
    counts = [min(math.floor(share), size) for share, size in zip(shares, coordinates.segments, strict=True)]
    rest = sorted(range(len(counts)), key=lambda i: counts[i] - shares[i])
    for i in rest[: total - sum(counts)]:
        counts[i] += 1
    return counts


def erk(shapes: Sequence[Sequence[int]], total: int) -> list[float]:
    """Weights kept per tensor, not yet rounded, by the Erdős-Rényi-Kernel rule (Evci et al., ICML 2020, section 3).

    The density of a tensor is proportional to Σ shape / Π shape, (n_in + n_out + w + h) / (n_in n_out w h); tensors
    whose density would exceed 1 stay dense, and the factor of the others is found anew.
    """
    sizes, sums = [math.prod(shape) for shape in shapes], [sum(shape) for shape in shapes]
    dense: set[int] = set()
    while True:
        left = total - sum(sizes[i] for i in dense)
        factor = left / max(1, sum(sums[i] for i in range(len(shapes)) if i not in dense))
        more = {i for i in range(len(shapes)) if i not in dense and factor * sums[i] > sizes[i]}
        if not more:
            return [float(sizes[i]) if i in dense else factor * sums[i] for i in range(len(shapes))]
        dense |= more


def lamp(
    coordinates: Coordinates,
    score: Tensor,  # (d,) ≥ 0
) -> Tensor:  # (d,) fp64
    """The LAMP score (Lee et al., ICLR 2021, section 2): s_u² / Σ_v s_v² over all v of the tensor that rank no lower.

    The best of every tensor has 1, so none is removed whole before each has one weight left. Of equal scores the
    lower index ranks higher.

    Raises:
        ValueError: a negative score, or NaN.
    """
    if not bool((score >= 0).all()):
        raise ValueError("allocation: wanted scores ≥ 0 with 'lamp', got negative ones or NaN: choose another")
    scaled = torch.empty(score.shape, dtype=torch.float64, device=score.device)
    segments = coordinates.segments
    for part, out in zip(score.split(segments), scaled.split(segments), strict=True):
        ranked, order = part.sort(descending=True, stable=True)
        squares = ranked.double().square()
        sums = squares.cumsum(0)
        out[order] = torch.where(sums > 0, squares / sums, 0.0)
    return scaled

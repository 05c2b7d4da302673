"""N:M patterns: of every M consecutive weights along the inputs of a layer N are kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import topk_mask
from .flat import Coordinates, PrunableTensor

WANTED = "integers (N, M) with 0 < N < M"


def is_pattern(pattern: Any) -> bool:
    """Whether it is a pair of integers N, M with 0 < N < M."""
    pair = isinstance(pattern, Sequence) and len(pattern) == 2 and all(type(number) is int for number in pattern)
    return pair and 0 < pattern[0] < pattern[1]


def sparsity_of(pattern: tuple[int, int]) -> float:
    """1 - N/M."""
    return 1 - pattern[0] / pattern[1]


def check_pattern(pattern: Any, sparsity: float) -> None:
    """``pattern`` is None, or (N, M) that keeps as many as the sparsity says.

    Raises:
        ValueError: it is not; the message names both.
    """
    if pattern is None:
        return
    if not is_pattern(pattern):
        raise ValueError(f"pattern: wanted None or {WANTED}, got {pattern!r}")
    if not math.isclose(sparsity_of(pattern), sparsity, abs_tol=1e-6):  # as rounded in the message
        kept, of = pattern
        raise ValueError(f"sparsity: wanted {1 - kept / of:g}, that of pattern=({kept}, {of}), got {sparsity!r}")


def check_divides(tensors: Sequence[PrunableTensor], pattern: tuple[int, int] | None) -> None:
    """M divides the number of inputs of every tensor.

    Raises:
        ValueError: not of all; the message names the others.
    """
    if pattern is None:
        return
    others = [tensor for tensor in tensors if tensor.inputs % pattern[1] or not tensor.inputs]
    if others:
        found = ", ".join(f"{tensor.name} of shape {tensor.shape}" for tensor in others)
        names = ", ".join(repr(tensor.name) for tensor in others)
        raise ValueError(
            f"pattern: wanted tensors with a multiple of {pattern[1]} inputs, got {found}: leave out what has another "
            f"number, ignored_layers=[{names}]"
        )


def best_of_groups(
    score: Tensor,
    pattern: tuple[int, int],
    backend: str | None = None,  # of the selection
) -> Tensor:  # bool, shaped like the score
    """The N best of every M consecutive entries along the last dimension, which M divides; ties to the lower index.

    Waits for no device. NaN is refused on the CPU, and ranks first elsewhere.
    """
    kept, of = pattern
    if score.device.type == "cpu":
        row = score.reshape(1, -1)
        backend = "reference" if score.dtype == torch.float64 else backend
        return topk_mask(row, row.shape[1] * kept // of, pattern=pattern, backend=backend).view(score.shape)
    # The op counts on the host what a pattern leaves, and would wait for it.
    return best_by_sorting(score, pattern)


def best_by_sorting(score: Tensor, pattern: tuple[int, int]) -> Tensor:  # bool, shaped like the score
    """As :func:`best_of_groups`, in plain torch."""
    kept, of = pattern
    groups = score.reshape(-1, of) + 0.0  # of one kind of zero: sorting on a GPU may tell them apart
    first = groups.sort(dim=1, descending=True, stable=True).indices[:, :kept]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, first, True).view(score.shape)


def pattern_mask(
    coordinates: Coordinates,
    score: Tensor,  # (d,)
    pattern: tuple[int, int],
    backend: str | None = None,
) -> Tensor:  # (d,) bool
    """Of every M consecutive weights along the inputs of a tensor the N best: d · N/M coordinates.

    Args:
        coordinates: the tensors, for each of which :func:`check_divides` holds.
        score: the higher, the sooner kept.
        pattern: (N, M), such as (2, 4).
        backend: of the selection.
    """
    mask = torch.empty_like(score, dtype=torch.bool)
    for tensor, part, out in zip(coordinates.tensors, coordinates.split(score), coordinates.split(mask), strict=True):
        along = part.movedim(tensor.input_dim, -1)
        out.movedim(tensor.input_dim, -1).copy_(best_of_groups(along, pattern, backend))
    return mask

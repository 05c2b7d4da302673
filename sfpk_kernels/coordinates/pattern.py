"""N:M patterns: of every M consecutive weights along the inputs of a layer N are kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from .flat import Coordinates, PrunableTensor

WANTED = "integers (N, M) with 0 < N < M"


def is_pattern(pattern: Any) -> TypeGuard[tuple[int, int]]:
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
        unknown = " whose inputs nothing tells"
        found = ", ".join(
            f"{tensor.name} of shape {tensor.shape}{unknown if tensor.input_dim < 0 else ''}" for tensor in others
        )
        names = ", ".join(repr(tensor.name) for tensor in others)
        raise ValueError(
            f"pattern: wanted tensors with a multiple of {pattern[1]} inputs, got {found}: leave out what has another "
            f"number, ignored_layers=[{names}]"
        )


def best_of_groups(score: Tensor, pattern: tuple[int, int]) -> Tensor:  # bool, shaped like the score
    """The N best of every M consecutive entries along the last dimension, which M divides; ties to the lower index.

    Scores are not NaN. In plain torch, on any device, which is not waited for.
    """
    kept, of = pattern
    columns = score.reshape(-1, of).t().clone(memory_format=torch.contiguous_format)
    return _rows(_best(columns, kept)).view(score.shape)


def pattern_mask(
    coordinates: Coordinates,
    score: Tensor,  # (d,)
    pattern: tuple[int, int],
) -> Tensor:  # (d,) bool
    """Of every M consecutive weights along the inputs of a tensor the N best: d · N/M coordinates.

    Args:
        coordinates: the tensors, for each of which :func:`check_divides` holds.
        score: the higher, the sooner kept; not NaN.
        pattern: (N, M), such as (2, 4).
    """
    kept, of = pattern
    parts = [
        part.movedim(tensor.input_dim, -1)
        for tensor, part in zip(coordinates.tensors, coordinates.split(score), strict=True)
    ]
    # The groups of all tensors side by side: a few operators for all of them.
    best = _best(torch.cat([part.reshape(-1, of).t() for part in parts], dim=1), kept)
    mask, begin = torch.empty_like(score, dtype=torch.bool), 0
    for tensor, part, out in zip(coordinates.tensors, parts, coordinates.split(mask), strict=True):
        end = begin + part.numel() // of
        out.movedim(tensor.input_dim, -1).copy_(_rows(best[:, begin:end]).view(part.shape))
        begin = end
    return mask


def _best(columns: Tensor, kept: int) -> Tensor:  # (M, groups), bool
    """The N best of every column."""
    of, groups = columns.shape
    dtype = torch.uint8 if of <= 256 else torch.int16
    # How many of its group go before each: those behind it and not beaten, those ahead that beat it.
    rank = torch.arange(of - 1, -1, -1, dtype=dtype, device=columns.device).unsqueeze(1).repeat(1, groups)
    for i in range(of - 1):  # each pair once: for M this small faster than sorting
        beaten = (columns[i] >= columns[i + 1 :]).view(torch.uint8)
        rank[i + 1 :] += beaten
        rank[i] -= beaten.sum(dim=0, dtype=dtype)
    return rank < kept


def _rows(columns: Tensor) -> Tensor:  # (M, groups) → (groups, M)
    """Transposed, and faster than by copying what t() gives."""
    return torch.stack(columns.unbind(), dim=1)

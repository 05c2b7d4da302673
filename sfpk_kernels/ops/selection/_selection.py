"""A selection as its backends take it, and whether it can be met at all."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...utils.tensors import as_numpy


@dataclass(frozen=True)
class Selection:
    """Rows of one (n, d) tensor ranked each by itself, or the tensors of a list ranked together.

    Every list beside ``values`` has one tensor per tensor of ``values``, or is empty.
    """

    op: str  # for messages
    values: list[Tensor]
    by_rows: bool
    k: Tensor  # (rows,) int64; one for a list
    score: str
    saliency: list[Tensor]  # (d,), or shaped like the values of a list
    sizes: list[Tensor]  # likewise, int64
    segments: list[int]  # (S + 1)
    min_keep: list[int]  # (S)
    max_keep: list[int]  # (S)
    pattern: tuple[int, int] | None
    protected: list[Tensor]  # bool, (rows, d) or shaped like the values of a list
    removed: list[Tensor]  # likewise
    guess: Tensor | None  # (rows, S)
    output: str  # "cut", "bool", "uint8" or "int32"

    @functools.cached_property
    def counts(self) -> list[int]:
        """k per row; waits for the device where it lies there."""
        counts: list[int] = self.k.tolist()
        return counts

    @property
    def rows(self) -> int:
        """How many rankings there are."""
        return self.k.shape[0]

    @property
    def constrained(self) -> bool:
        """Whether anything but k decides."""
        return bool(self.sizes or self.min_keep or self.max_keep or self.pattern or self.protected or self.removed)

    def who(self, row: int) -> str:
        """The row, for messages."""
        return f" in row {row}" if self.by_rows else ""

    def set_aside(self) -> list[Tensor]:
        """What is not ranked: protected or removed."""
        if self.protected and self.removed:
            return [a | b for a, b in zip(self.protected, self.removed, strict=True)]
        return self.protected or self.removed


class Remaining(NamedTuple):
    """What is left to solve once protected entries are counted."""

    counts: list[int]  # (rows,) how many candidates to keep, or the budget left for them
    limits: Tensor  # (3, rows, S) int64 on the CPU: candidates to keep at least, at most; candidates there are


def nan_error(selection: Selection, where: int) -> ValueError:
    """The error for a NaN score in row, or tensor of the list, number ``where``."""
    place = f"row {where}" if selection.by_rows else f"values[{where}]"
    return ValueError(f"{selection.op}: values: wanted no NaN score, got NaN in {place}")


def check_pattern(selection: Selection) -> None:
    """No group may have more protected entries than the pattern keeps."""
    if selection.pattern is None:
        return
    keep, group = selection.pattern
    for protected in selection.protected:
        if protected.numel():
            most = int(protected.reshape(-1, group).sum(dim=1).max())
            if most > keep:
                raise ValueError(
                    f"{selection.op}: protected: wanted at most {keep} in each group of {group}, got {most} in one"
                )


def check_values(selection: Selection) -> None:
    """What only the values of companions can tell."""
    for sizes in selection.sizes:
        if sizes.numel() and not bool(sizes.min() >= 1):
            raise ValueError(f"{selection.op}: sizes: wanted integers ≥ 1, got {int(sizes.min())}")
    for protected, removed in zip(selection.protected, selection.removed, strict=False):
        both = _true(protected & removed)
        if both:
            raise ValueError(f"{selection.op}: removed: wanted no protected entries, got {both}")
    check_pattern(selection)


def _count(selection: Selection, masks: list[Tensor]) -> list[list[int]]:
    """True entries per row and segment."""
    borders = list(itertools.pairwise(selection.segments))
    if not masks:
        return [[0] * len(borders)] * selection.rows
    if selection.by_rows:
        alike = masks[0].stride(0) == 0  # one mask expanded to all rows
        rows = [[_true(row[begin:end]) for begin, end in borders] for row in (masks[0][:1] if alike else masks[0])]
        return rows * selection.rows if alike else rows
    counts = [_true(mask) for mask in masks]
    return [counts if len(borders) == len(counts) else [sum(counts)]]


def _true(mask: Tensor) -> int:
    # On the CPU, NumPy counts bools more than ten times as fast.
    return int(np.count_nonzero(as_numpy(mask))) if mask.device.type == "cpu" else int(torch.count_nonzero(mask))


def remaining(
    selection: Selection,
    excluded: list[Tensor],  # bool, one per tensor of values, or empty: protected, removed or left out by the pattern
) -> Remaining:
    """What the backends have to solve.

    Raises:
        ValueError: no selection satisfies the constraints; the message says which.
    """
    fixed, aside = _count(selection, selection.protected), _count(selection, excluded)
    lengths = [b - a for a, b in zip(selection.segments, selection.segments[1:], strict=False)]
    counts, limits = [], []
    for row, k in enumerate(selection.counts):
        free = [length - out for length, out in zip(lengths, aside[row], strict=True)]
        if selection.sizes:
            counts.append(_budget(selection, row, k))
            limits.append([[0] * len(free), free, free])
        else:
            counts.append(_check_count(selection, row, k, sum(fixed[row]), sum(free)))
            limits.append(_row_limits(selection, row, k, fixed[row], free))
    table = torch.tensor(limits, dtype=torch.int64, device="cpu").reshape(len(limits), 3, len(lengths))
    return Remaining(counts, table.transpose(0, 1).contiguous())


def _budget(selection: Selection, row: int, k: int) -> int:
    spent = 0
    for sizes, protected in zip(selection.sizes, selection.protected, strict=False):
        spent += int(sizes[protected[row] if selection.by_rows else protected].sum())
    if k < max(spent, 0):
        what = f"≥ {spent}, the weights of the protected entries" if spent else "≥ 0"
        raise ValueError(f"{selection.op}: k: wanted {what}, got {k}{selection.who(row)}")
    return k - spent


def _check_count(selection: Selection, row: int, k: int, fixed: int, free: int) -> int:
    d = selection.segments[-1]
    if not 0 <= k <= d:
        raise ValueError(f"{selection.op}: k: wanted 0 ≤ k ≤ {d}, got {k}{selection.who(row)}")
    if k < fixed:
        raise ValueError(f"{selection.op}: k: wanted ≥ {fixed}, the protected entries, got {k}{selection.who(row)}")
    if k > fixed + free:
        raise ValueError(
            f"{selection.op}: k: wanted ≤ {fixed + free}, the entries that removed and pattern leave, "
            f"got {k}{selection.who(row)}"
        )
    return k - fixed


def _row_limits(selection: Selection, row: int, k: int, fixed: list[int], free: list[int]) -> list[list[int]]:
    parts = len(free)
    floors, caps = selection.min_keep or [0] * parts, selection.max_keep or [selection.segments[-1]] * parts
    for s in range(parts):
        if floors[s] > fixed[s] + free[s]:
            raise ValueError(
                f"{selection.op}: min_keep: wanted ≤ {fixed[s] + free[s]}, the candidates of segment {s}, "
                f"got {floors[s]}{selection.who(row)}"
            )
        if caps[s] < fixed[s]:
            raise ValueError(
                f"{selection.op}: max_keep: wanted ≥ {fixed[s]}, the protected entries of segment {s}, "
                f"got {caps[s]}{selection.who(row)}"
            )
    low = [max(floor - p, 0) for floor, p in zip(floors, fixed, strict=True)]
    high = [min(cap - p, f) for cap, p, f in zip(caps, fixed, free, strict=True)]
    least, most = sum(low) + sum(fixed), sum(high) + sum(fixed)
    if k < least:
        raise ValueError(f"{selection.op}: k: wanted ≥ {least}, what min_keep demands, got {k}{selection.who(row)}")
    if k > most:
        raise ValueError(f"{selection.op}: k: wanted ≤ {most}, what max_keep allows, got {k}{selection.who(row)}")
    return [low, high, free]

"""Coordinates from the best to the worst, and how many of each class are kept down to a rank."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ._counting import Counting, Integers
from .axes import Structure

Bools = npt.NDArray[np.bool_]


class Ranking:
    """What is kept at each rank: the floor, the best coordinates beside it, and what fills groups up.

    Args:
        structure, counting: of one model.
        score: (C,) on the CPU.
        min_keep, round_to: as for :func:`~sfpk_kernels.structure.select`.

    Attributes:
        order: (C,) the coordinates from the best on.
        floor: (C,) bool, what stays at every rank.
        free: the others, from the best on; a rank says how many of them are kept.
    """

    def __init__(self, structure: Structure, counting: Counting, score: Tensor, min_keep: int, round_to: int):
        self.counting, self.round_to = counting, round_to
        self.order = from_the_best(score)
        self._sizes = np.array([group.size for group in structure.groups], dtype=np.int64)
        self._ends = self._sizes.cumsum()
        groups = counting.groups
        self._by_group = self.order[_stable(groups[self.order], len(self._sizes))]
        self.floor = np.zeros(structure.size, dtype=np.bool_)
        within = np.arange(structure.size, dtype=np.int64) - (self._ends - self._sizes)[groups]
        self.floor[self._by_group[within < min_keep]] = True
        for coordinates in structure.narrow:
            layer = coordinates.numpy()
            if not self.floor[layer].any():
                place = np.empty_like(self.order)
                place[self.order] = np.arange(structure.size, dtype=np.int64)
                self.floor[layer[place[layer].argmin()]] = True
        self.free = self.order[~self.floor[self.order]]
        self._floors = self.count(self.floor)

    def keep(self, rank: int) -> Bools:  # (C,)
        """The floor and the best ``rank``, groups filled up to what they may keep: more with every rank."""
        keep = self.floor.copy()
        keep[self.free[:rank]] = True
        if self.round_to > 1:
            counts = self._of_groups(self.count(keep)[None])[0]
            for group in (self._allowed(counts) > counts).nonzero()[0]:
                self._fill(keep, int(group))
        return keep

    def with_one(self, keep: Bools, coordinate: int) -> Bools:  # (C,)
        """A copy with one more, its group filled up to what it may keep."""
        keep = keep.copy()
        keep[coordinate] = True
        self._fill(keep, int(self.counting.group[self.counting.of[coordinate]]))
        return keep

    def count(self, keep: Bools) -> Integers:  # (K,)
        """How many of each class are kept."""
        return np.bincount(self.counting.of[keep], minlength=self.counting.classes)

    def counts(
        self,
        ranks: Integers,  # (rows,) ascending
    ) -> Integers:  # (rows, K)
        """How many of each class :meth:`keep` keeps at these ranks."""
        classes = self.counting.classes
        rows = np.repeat(np.arange(len(ranks), dtype=np.int64), np.diff(ranks, prepend=0))
        cells = self.counting.of[self.free[: len(rows)]] + classes * rows
        added = np.bincount(cells, minlength=classes * len(ranks)).reshape(-1, classes).cumsum(0)
        if self.round_to > 1:
            floors = self._of_groups(self._floors[None])
            wanted = self._allowed(self._of_groups(self._floors + added)) - floors  # of the free ones of each group
            keys, firsts, width = self._free_by_class
            wanted = wanted[:, self.counting.group] + width * np.arange(classes, dtype=np.int64)
            added = np.searchsorted(keys, wanted) - firsts
        return self._floors + added

    def one_more(self, counts: Integers) -> tuple[Integers, Bools]:  # (K,) each
        """How many more of a class are kept with the next one of it; and where this is all that is kept more.

        It is not where others fill the group up, nor known where classes of several groups are alike.
        """
        in_group, in_number = self.counting.single
        if self.round_to == 1:
            return np.ones_like(counts), in_number
        group = self.counting.group
        now = self._of_groups(counts[None])[0]
        return (self._allowed(now + 1) - now)[group], in_number & in_group

    @cached_property
    def _free_by_class(self) -> tuple[Integers, Integers, int]:
        """Sorted keys of the free ones: class · width + place among the free ones of the group; where classes begin."""
        free = self._by_group[~self.floor[self._by_group]]
        classes = self.counting.of[free]
        lengths = np.bincount(self.counting.group[classes], minlength=len(self._sizes))
        place = np.arange(len(free), dtype=np.int64) - np.repeat(lengths.cumsum() - lengths, lengths)
        width, of_classes = len(self.order) + 1, np.bincount(classes, minlength=self.counting.classes)
        by_class = _stable(classes, self.counting.classes)
        return (classes * width + place)[by_class], of_classes.cumsum() - of_classes, width

    def _of_groups(self, counts: Integers) -> Integers:  # (rows, K) to (rows, groups)
        """Classes are numbered group after group."""
        return np.add.reduceat(counts, self._firsts, axis=1)

    @cached_property
    def _firsts(self) -> Integers:
        """The first class of each group."""
        return np.searchsorted(self.counting.group, np.arange(len(self._sizes), dtype=np.int64))

    def _allowed(self, counts: Integers) -> Integers:  # (…, groups)
        """The least numbers that groups may keep and are no smaller."""
        return np.minimum(-(-counts // self.round_to) * self.round_to, self._sizes)

    def _fill(self, keep: Bools, group: int) -> None:
        """Keep more of a group, from the best on, until it has what it may keep."""
        best = self._by_group[self._ends[group] - self._sizes[group] : self._ends[group]]
        missing = best[~keep[best]]
        count = len(best) - len(missing)
        wanted = min(-(-count // self.round_to) * self.round_to, len(best))
        keep[missing[: wanted - count]] = True


def from_the_best(
    score: Tensor,  # (C,) fp64 on the CPU
) -> Integers:  # (C,)
    """``score.argsort(descending=True, stable=True)``, in a fraction of its time."""
    values = -score.numpy()
    if np.isnan(values).any():
        return score.argsort(descending=True, stable=True).numpy()
    order = values.argsort()
    values = values[order]
    runs = np.zeros_like(order)  # of equal ones, which are to ascend
    np.cumsum(values[1:] != values[:-1], out=runs[1:])
    return np.sort(runs * len(order) + order) - runs * len(order)


def _stable(numbers: Integers, count: int) -> Integers:
    """An order in which these numbers below ``count`` ascend, else as they stand; the narrow ones sort in O(length)."""
    return (numbers.astype(np.uint16) if count < 2**16 else numbers).argsort(kind="stable")

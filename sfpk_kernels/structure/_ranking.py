"""Coordinates from the best to the worst, and how many of each class are kept down to a rank."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ._counting import Counting, Integers
from .axes import Structure
from .limits import Limits

Bools = npt.NDArray[np.bool_]


class Ranking:
    """What is kept at each rank: the floor, the best coordinates beside it, and what fills groups up.

    Args:
        structure, counting: of one model.
        score: (C,) on the CPU.
        limits: of the same structure; what :func:`~sfpk_kernels.structure.limits.limits_of` gives.

    Attributes:
        order: the coordinates that may stay, from the best on: what lies above the ceilings is in no ranking.
        floor: (C,) bool, what stays at every rank.
        free: the others, from the best on; a rank says how many of them are kept.
    """

    def __init__(self, structure: Structure, counting: Counting, score: Tensor, limits: Limits):
        self.counting, self.limits, self.round_to = counting, limits, limits.round_to
        self.order = from_the_best(score)
        sizes = np.array([group.size for group in structure.groups], dtype=np.int64)
        least, self._most = (np.array(numbers, dtype=np.int64) for numbers in (limits.least, limits.most))
        groups = counting.groups
        self._by_group = self.order[_stable(groups[self.order], len(sizes))]
        within = np.arange(structure.size, dtype=np.int64) - (sizes.cumsum() - sizes)[groups]
        self.floor = np.zeros(structure.size, dtype=np.bool_)
        self.floor[self._by_group[within < least[groups]]] = True
        narrow = [coordinates.numpy() for coordinates in structure.narrow]
        for layer in narrow:
            if not self.floor[layer].any():
                place = np.empty_like(self.order)
                place[self.order] = np.arange(structure.size, dtype=np.int64)
                self.floor[layer[place[layer].argmin()]] = True
        if (self._most < sizes).any():
            self._drop_above(narrow)
        self._ends = self._most.cumsum()
        self.free = self.order[~self.floor[self.order]]
        self._floors = self.count(self.floor)

    def _drop_above(self, narrow: Sequence[Integers]) -> None:
        """Leave of each group its floor and its best others, as many in all as may stay."""
        groups = self.counting.groups
        floors = np.bincount(groups[self.floor], minlength=len(self._most))
        for group in (floors > self._most).nonzero()[0]:
            best = self._by_group[groups[self._by_group] == group]
            for coordinate in best[self.floor[best]][::-1]:
                if floors[group] == self._most[group]:
                    break
                # Some were added for the sake of layers, which others may keep alive as well.
                self.floor[coordinate] = False
                if all(self.floor[layer].any() for layer in narrow):
                    floors[group] -= 1
                else:
                    self.floor[coordinate] = True
        others = self._by_group[~self.floor[self._by_group]]
        numbers = np.bincount(groups[others], minlength=len(floors))
        place = np.arange(len(others), dtype=np.int64) - (numbers.cumsum() - numbers)[groups[others]]
        stays = self.floor.copy()
        stays[others[place < (self._most - floors)[groups[others]]]] = True
        self._by_group, self.order = self._by_group[stays[self._by_group]], self.order[stays[self.order]]

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
        lengths = np.bincount(self.counting.group[classes], minlength=len(self._most))
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
        return np.searchsorted(self.counting.group, np.arange(len(self._most), dtype=np.int64))

    def _allowed(self, counts: Integers) -> Integers:  # (…, groups)
        """The least numbers that groups may keep and are no smaller."""
        return np.minimum(-(-counts // self.round_to) * self.round_to, self._most)

    def _fill(self, keep: Bools, group: int) -> None:
        """Keep more of a group, from the best on, until it has what it may keep."""
        best = self._by_group[self._ends[group] - self._most[group] : self._ends[group]]
        missing = best[~keep[best]]
        count = len(best) - len(missing)
        keep[missing[: self.limits.allowed(group, count) - count]] = True


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

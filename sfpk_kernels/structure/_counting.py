"""The costs of many selections at once, from how many coordinates of each class are kept.

Coordinates of a class are of one group and change the same dims by as much: which of them are kept costs the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Terms:
    """A cost as Σ constant · Π lengths of dims, plus what each coordinate of a class costs by itself."""

    dims: Integers  # (terms, widest) places among the lengths
    constants: Integers  # (terms,)
    own: Integers  # (K,) of a coordinate
    fixed: int

    @cached_property
    def has_own(self) -> bool:
        """Whether coordinates cost something by themselves."""
        return bool(self.own.any())


@dataclass(frozen=True, eq=False)
class Counting:
    """What is kept by class, and what that costs; classes are numbered group after group."""

    of: Integers  # (C,) the class of each coordinate
    group: Integers  # (K,) whose coordinates a class has
    alike: Integers  # (K,) classes of several groups may be alike
    steps: npt.NDArray[np.float64]  # (K, dims) positions of each dim that one coordinate more keeps; whole numbers
    always: Integers  # (dims,) positions that are always kept
    terms: Mapping[str, Terms]

    @property
    def classes(self) -> int:
        """K."""
        return len(self.group)

    @cached_property
    def groups(self) -> Integers:  # (C,)
        """The group of each coordinate."""
        return self.group[self.of]

    @cached_property
    def numbers(self) -> Integers:  # (C,)
        """What those that are alike have in common."""
        return self.alike[self.of]

    @cached_property
    def single(self) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:  # (K,) each
        """Which classes have their group to themselves, and which are like no other."""
        return np.bincount(self.group)[self.group] == 1, np.bincount(self.alike)[self.alike] == 1

    def costs(
        self,
        counts: npt.NDArray[Any],  # (rows, K) whole numbers
        budget: str,
    ) -> Integers:  # (rows,)
        """What is left with so many coordinates of each class, exactly."""
        terms = self.terms[budget]
        found = np.full(len(counts), terms.fixed, dtype=np.int64)
        if terms.has_own:
            found += counts.astype(np.int64) @ terms.own
        if len(terms.constants):
            # Whole numbers far below 2^53: exact, in whatever order they are added.
            lengths = (counts.astype(np.float64) @ self.steps).astype(np.int64) + self.always
            products = lengths[:, terms.dims[:, 0]]
            for column in terms.dims.T[1:]:
                products *= lengths[:, column]
            found += products @ terms.constants
        return found


def counting(
    alike: Integers,  # (C,)
    groups: Integers,  # (C,) the group of each coordinate
    entries: tuple[Integers, Integers],  # pairs of a dim, from 1 on, and a coordinate: once for each position
    always: Integers,  # (1 + dims,) positions of each dim that are kept whatever goes; that of dim 0 is the factor 1
    factors: Integers,  # (T, widest) the dims of each parameter, 0 for none
    constants: Mapping[str, Integers],  # by budget (T,): by what the product of the lengths is multiplied
    own: Mapping[str, Integers],  # by budget (C,)
    fixed: Mapping[str, int],
) -> Counting:
    """Dims and parameters that are always as long as one another are counted as one."""
    _, first, of = np.unique(alike + groups * (alike.max() + 1), return_index=True, return_inverse=True)
    of = of.reshape(-1)
    steps = np.zeros((len(first), len(always)), dtype=np.int64)
    sizes = np.bincount(of, minlength=len(first))
    np.add.at(steps, (of[entries[1]], entries[0]), 1)
    steps //= sizes[:, None]
    # Dims of the same lengths: one of them.
    columns, place = np.unique(np.vstack([steps, always]), axis=1, return_inverse=True)
    place = place.reshape(-1)
    dims, one = place[factors], int(place[0])
    terms = {
        budget: Terms(*_terms(dims, values, one), own[budget][first], fixed[budget])
        for budget, values in constants.items()
    }
    return Counting(of, groups[first], alike[first], columns[:-1].astype(np.float64), columns[-1], terms)


def _terms(dims: Integers, constants: Integers, one: int) -> tuple[Integers, Integers]:
    """Products of the same dims added up, those of nothing left out."""
    totals: dict[Sequence[int], int] = {}
    for row, constant in zip(dims.tolist(), constants.tolist(), strict=True):
        if constant:
            key = tuple(sorted(dim for dim in row if dim != one))
            totals[key] = totals.get(key, 0) + constant
    widest = max((len(key) for key in totals), default=0) or 1
    rows = [[*key, *[one] * (widest - len(key))] for key in totals]
    return np.array(rows, dtype=np.int64).reshape(-1, widest), np.array([*totals.values()], dtype=np.int64)

"""Ranges of fractions by name, such as the sparsities that layers may have."""

from __future__ import annotations

import numbers
from collections.abc import Iterator, Mapping
from typing import Any

_WANTED = "a dict of ranges (low, high) by name, 0 ≤ low ≤ high ≤ 1"


class Ranges(Mapping[str, tuple[float, float]]):
    """Such a dict that cannot be changed, and so may stand in settings that cannot be."""

    __slots__ = ("_ranges",)

    def __init__(self, ranges: Mapping[str, tuple[float, float]]):
        self._ranges = dict(ranges)

    def __getitem__(self, name: str) -> tuple[float, float]:
        return self._ranges[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._ranges)

    def __len__(self) -> int:
        return len(self._ranges)

    def __hash__(self) -> int:
        return hash(frozenset(self._ranges.items()))

    def __repr__(self) -> str:
        return repr(self._ranges)


def check_ranges(name: str, value: Any) -> Ranges | None:
    """A copy; None for None, and for an empty dict.

    Raises:
        TypeError: no dict of pairs of numbers by strings.
        ValueError: a range that is none, or not within 0 … 1; an empty name.
    """
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise TypeError(f"{name}: wanted {_WANTED}, or None, got {value!r}")
    found: dict[str, tuple[float, float]] = {}
    for key, pair in value.items():
        if not isinstance(key, str):
            raise TypeError(f"{name}: wanted {_WANTED}, got the name {key!r}")
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(map(_is_number, pair)):
            raise TypeError(f"{name}: wanted {_WANTED}, got {key!r}: {pair!r}")
        low, high = map(float, pair)
        if not key or not 0 <= low <= high <= 1:
            raise ValueError(f"{name}: wanted {_WANTED}, got {key!r}: {pair!r}")
        found[key] = (low, high)
    return Ranges(found) if found else None


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)

"""How many coordinates of each group may stay: floors, ceilings and multiples."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..utils.arguments import check_least
from ..utils.ranges import check_ranges
from .axes import CoordinateGroup, Structure

Ranges = Mapping[str, tuple[float, float]]  # sparsity (low, high) by name


@dataclass(frozen=True)
class Limits:
    """Of every group at least and at most so many coordinates stay, and a multiple of ``round_to``, or all."""

    least: tuple[int, ...]  # by group
    most: tuple[int, ...]
    round_to: int

    def allowed(
        self,
        number: int,  # of the group
        count: int,
    ) -> int:
        """The least number that a group may keep and is no smaller, or the most that it may keep."""
        return min(-(-count // self.round_to) * self.round_to, self.most[number])

    def loosened(self, structure: Structure) -> Limits:
        """Each ceiling one step higher: what rounding to whole coordinates may have taken."""
        most = [min(most + self.round_to, group.size) for most, group in zip(self.most, structure.groups, strict=True)]
        return Limits(self.least, tuple(most), self.round_to)


def limits_of(
    structure: Structure, min_keep: int = 1, round_to: int = 1, layer_sparsity: Ranges | None = None
) -> Limits:
    """The numbers that settings say.

    Args:
        structure: the coordinates.
        min_keep: at least so many of every group stay, or all of a smaller one.
        round_to: groups keep a multiple of it, or all.
        layer_sparsity: sparsity (low, high) of the groups of a module, of all modules inside of one, or of those that
            ``"re:…"`` matches; counts are round((1 − sparsity) · size). A group has the names of all modules that
            compute it, and has to be in all ranges that match it.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: one out of its range; a name that matches no group; a range that a group cannot have.
    """
    check_least("min_keep", min_keep, 1)
    check_least("round_to", round_to, 1)
    checked = check_ranges("layer_sparsity", layer_sparsity)
    wanted: list[dict[str, tuple[float, float]]] = [{} for _ in structure.groups]
    if checked is not None:
        names = _names(structure)
        for name, both in checked.items():
            for number in _matching(names, name, structure):
                wanted[number][name] = both
    least, most = [], []
    for group, ranges in zip(structure.groups, wanted, strict=True):
        size = group.size
        low = max(min(min_keep, size), *(round((1 - highest) * size) for _, highest in ranges.values()), 1)
        high = min(size, *(round((1 - lowest) * size) for lowest, _ in ranges.values()), size)
        low, high = min(-(-low // round_to) * round_to, size), size if high == size else high // round_to * round_to
        low = low if high == size else max(low, _needed(structure, group))
        if low > high:
            of = ", ".join(f"{name!r}: {found}" for name, found in ranges.items())
            raise ValueError(
                f"layer_sparsity: wanted ranges that {group.name} can have, of whose {size} {group.kind}s at least "
                f"{low} stay (min_keep={min_keep}, round_to={round_to}), got {of}, by which at most {high} do"
            )
        least.append(low)
        most.append(high)
    return Limits(tuple(least), tuple(most), round_to)


def _matching(names: list[set[str]], wanted: str, structure: Structure) -> list[int]:
    """The numbers of the groups of a module, of all modules inside of one, or of those that ``"re:…"`` matches.

    Expressions match from the beginning of a name, as those of ``ignored_layers`` do.

    Raises:
        ValueError: no group, or no valid expression.
    """
    if wanted.startswith("re:"):
        try:
            pattern = re.compile(wanted.removeprefix("re:"))
        except re.error as error:
            raise ValueError(f"layer_sparsity: wanted a valid pattern, got {wanted!r}: {error}") from error
        found = [i for i, of in enumerate(names) if any(map(pattern.match, of))]
    else:
        found = [i for i, of in enumerate(names) if any(n == wanted or n.startswith(f"{wanted}.") for n in of)]
    if not found:
        known = [group.name for group in structure.groups]
        more = f" and {len(known) - 8} more" if len(known) > 8 else ""
        raise ValueError(f"layer_sparsity: wanted names among {', '.join(known[:8])}{more}, got {wanted!r}")
    return found


def _names(structure: Structure) -> list[set[str]]:
    """Of each group: its own, and those of the modules that compute it."""
    found = [{group.name} for group in structure.groups]
    for entry in structure.entries:
        if entry.role == "producer":
            for number, group in enumerate(structure.groups):
                if bool(((entry.index >= group.first) & (entry.index < group.first + group.size)).any()):
                    found[number].add(entry.tensor.rpartition(".")[0])
    return found


def _needed(structure: Structure, group: CoordinateGroup) -> int:
    """So many coordinates of a group keep alive all layers that it is a part of."""
    layers = [set(layer.tolist()) for layer in structure.layers]
    layers = [layer for layer in layers if not any(other < layer for other in layers)]  # the others live with these
    inside = set(range(group.first, group.first + group.size))
    return sum(bool(layer & inside) for layer in layers)

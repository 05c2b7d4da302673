"""Methods against each other on the same networks: differences, ties, and the passes one needs to equal another."""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Iterable, Mapping
from itertools import pairwise
from typing import NamedTuple

from .records import Row
from .task import Task

Values = Mapping[Hashable, float]  # by network


class Difference(NamedTuple):
    """Of two methods, over the networks that both have."""

    mean: float  # > 0: the first is better
    error: float  # standard error of the mean; NaN for one seed
    seeds: int

    @property
    def clear(self) -> bool:
        """Whether it is more than two standard errors."""
        return abs(self.mean) > 2 * self.error  # not of NaN


def by_network(rows: Iterable[Row]) -> dict[Hashable, float]:
    """Values of one method in one column of a table.

    A network is known by its seed and what it measured before, but for rounding: where those that are kept do not fit,
    as with another Python's texts, machines with other vector units train others of one seed.
    """
    return {(row.cell.seed, round(row.dense, 4)): row.value for row in rows}


def difference(task: Task, ours: Values, theirs: Values) -> Difference | None:
    """Paired over networks; ``None`` where they share none, or a value is not finite."""
    sign = 1 if task.higher else -1
    pairs = [sign * (ours[seed] - theirs[seed]) for seed in ours if seed in theirs]
    if not pairs or not all(math.isfinite(pair) for pair in pairs):
        return None
    error = statistics.stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else math.nan
    return Difference(statistics.fmean(pairs), error, len(pairs))


def best(task: Task, groups: Mapping[str, Values]) -> str | None:
    """The name of the best mean, among those with most seeds."""
    seeds = max(map(len, groups.values()), default=0)
    means = {name: statistics.fmean(values.values()) for name, values in groups.items() if values}
    whole = [name for name in means if len(groups[name]) == seeds]
    return (max if task.higher else min)(whole, key=means.__getitem__, default=None)


def tied(task: Task, values: Values, with_best: Values) -> bool:
    """Whether the mean is within one standard error, paired over seeds, of the best one's; fewer seeds do not tell."""
    if values == with_best:
        return True
    found = difference(task, values, with_best)
    if found is None or found.seeds < len(with_best):
        return False
    return found.mean >= -(0.0 if math.isnan(found.error) else found.error) - 1e-12


def passes_to(
    task: Task,
    curve: Mapping[int, float],  # quality by passes
    quality: float,
) -> tuple[str, float]:  # "≤", "" or ">", and passes
    """How many passes reach a quality: where the curve first does, interpolated over the logarithm of passes."""
    sign = 1 if task.higher else -1
    points = [(count, sign * value) for count, value in sorted(curve.items())]
    wanted = sign * quality
    if points[0][1] >= wanted:
        return "≤", float(points[0][0])
    for (fewer, below), (more, above) in pairwise(points):
        if above >= wanted:
            share = (wanted - below) / (above - below)
            return "", math.exp(math.log(fewer) + share * (math.log(more) - math.log(fewer)))
    return ">", float(points[-1][0])

"""The one way a loss is smoothed: for the knee that is looked for, and for the curve that is drawn."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

WINDOW = 5  # steps


def running_median(values: Sequence[float]) -> list[float]:
    """The median of each value and the two on either side; beyond the ends the first and the last stand again."""
    half = WINDOW // 2
    padded = [*list(values[:1]) * half, *values, *list(values[-1:]) * half]
    return [statistics.median(padded[i : i + WINDOW]) for i in range(len(values))]

"""What the averaging of gradients gives, and how it follows from the sums that backends take."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class GradientStats(NamedTuple):
    """What is measured of a step's gradients, e = θ ⊙ ∂L/∂W, before they are averaged; NaN for zeros, NaN, infinities.

    Attributes:
        cosines: (rows,) fp64, cos(e, θ ⊙ v) with the averages v behind the step; NaN without any.
        effective_dimensions: (rows,) fp64, (Σe²)² / (d Σe⁴): 1 where all coordinates share a gradient alike, 1/d where
            one has it all.
    """

    cosines: Tensor
    effective_dimensions: Tensor


def statistics(
    sums: Tensor,  # (rows, 4) fp64: Σab, Σa², Σb², Σa⁴ of a = e and b = θ ⊙ v
    d: int,
) -> GradientStats:
    """Of all columns."""
    both, squares, of_averages, fourths = sums.unbind(1)
    return GradientStats(both / (squares.sqrt() * of_averages.sqrt()), squares.square() / (d * fourths))

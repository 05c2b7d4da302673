"""Losses and gradients that are NaN or infinite: an error that names the particle, or a particle that stands still.

The transition finds them on the device, in sums it takes anyway, and leaves their particles where they are; the host
learns of them with everything else it reads of a step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor


def spoil_(
    grads: Tensor,  # (rows, d)
    bad: Tensor,  # (rows,) bool
) -> None:
    """Make rows of gradients count as not finite, without a pass over them."""
    grads[:, 0].masked_fill_(bad, float("nan"))


def standing_still(
    energies: Sequence[float],  # one per particle
    cosines: Sequence[float],  # of the transition: NaN where it found a gradient that is not finite
    step: int,
    skips: bool,  # config.nonfinite == "skip_particle"
) -> list[int]:
    """The particles that did not move, in order.

    Raises:
        NonFiniteError: there are some and none may be skipped, or no particle of the step is left.
    """
    bad = [i for i, cosine in enumerate(cosines) if math.isnan(cosine)]
    if bad and (not skips or len(bad) == len(cosines)):
        raise NonFiniteError(bad[0], energies[bad[0]], step, alone=skips)
    return bad


class NonFiniteError(FloatingPointError):
    """A loss or gradient that is not finite; names the first particle of the step that has one."""

    def __init__(self, particle: int, energy: float, step: int, alone: bool):
        what, got = "loss", str(energy)
        if math.isfinite(energy):
            what, got = "gradient", "NaN, infinity or numbers too large to square"
        super().__init__(f"loss_fn: wanted a finite {what}, got {got} in step {step}, particle {particle}")
        # How many particles may have moved: those before it, where they go one after the other.
        self.moved = 0 if alone else particle


def not_finite(energies: Tensor) -> Tensor:  # bool
    """Which losses are NaN or infinite."""
    return energies.isfinite().logical_not()

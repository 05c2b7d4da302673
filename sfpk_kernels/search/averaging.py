"""Gradients averaged over the last steps, so that what one mini-batch undoes of another does not move a particle."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from ..config import SFPKConfig
from .pieces import pieces
from .records import StepRecord

_LOOKS_BACK = 0.15  # fraction of the run over which agreements are averaged
_GAIN, _POWER = 2.0, 0.6  # empirical fits


def most(config: SFPKConfig) -> float:
    """The largest β there may be, 1 - 1/h with a horizon of h = averaging · K steps; 0 below 1: nothing is averaged."""
    return max(0.0, 1.0 - 1.0 / max(1.0, config.averaging * config.n_steps))


def staying(config: SFPKConfig, history: Sequence[StepRecord]) -> float:
    """β: what stays of the average in the next step, -2c within 0 and :func:`most`.

    c is the mean agreement (:class:`Agreements`) in the last 0.15 K steps: gradients that point against what particles
    moved along say that moves overshoot. Those before the step count, which reach the host with everything else it
    reads of them, so nothing waits. 0 as long as there are none.
    """
    last = history[-max(1, round(_LOOKS_BACK * config.n_steps)) :]
    means = [[value for value in record.agreements if math.isfinite(value)] for record in last]
    found = [statistics.fmean(values) for values in means if values]
    return min(most(config), max(0.0, -_GAIN * statistics.fmean(found))) if found else 0.0


def shortening(beta: float) -> float:
    """Factor on the angle of a move along an average, ((1 - β)/(1 + β))^0.6.

    The average of gradients that have nothing in common is sqrt((1 - β)/(1 + β)) times as long as one of them: moves
    along it add up to as much as moves along each. Those of successive steps point against each other in part.
    """
    return float(((1.0 - beta) / (1.0 + beta)) ** _POWER)


class Agreements:
    """How far each particle's gradient points along the average behind it, particle by particle; waits for nothing.

    The cosine of θ ⊙ ∂L/∂W and of θ times the average of those before, in (n,) fp64: NaN where either is zero, as in
    the first step, or not finite.

    Args:
        theta: (d,) dense weights, where the gradients are.
        averages: (n, d) behind the step before; read when the gradient of a particle is observed.
    """

    def __init__(self, theta: Tensor, averages: Tensor):
        self._theta, self._averages = theta, averages
        self._found: list[Tensor] = []

    def observe(self, grads: Tensor) -> None:  # (rows, d) ∂L/∂W
        """Those of the next particles."""
        first = sum(map(len, self._found))
        self._found.append(cosines(grads, self._averages[first : first + len(grads)], self._theta))

    @property
    def values(self) -> Tensor:  # (n,) fp64
        """Of all that were seen."""
        return torch.cat(self._found)


@torch.no_grad()
def cosines(grads: Tensor, averages: Tensor, theta: Tensor) -> Tensor:
    """cos(θ ⊙ g, θ ⊙ v), row by row.

    Args:
        grads: g (rows, d), any float.
        averages: v (rows, d), any float.
        theta: (d,), any float.

    Returns:
        (rows,) fp64; NaN where one of the two is zero or not finite.
    """
    sums = torch.zeros(3, len(grads), dtype=torch.float64, device=grads.device)
    for g, v, weights in pieces(grads, averages, theta):
        one, other = g.double() * weights, v.double() * weights  # in fp64: squares of small numbers
        sums += torch.stack([(one * other).sum(1), one.square_().sum(1), other.square_().sum(1)])
    return sums[0] / (sums[1].sqrt() * sums[2].sqrt())


def blend_(
    grads: Tensor,  # (rows, d) of this step, written: averages
    average: Tensor,  # (rows, d) behind the step before
    beta: float,
) -> None:
    """grads ← β·average + (1 - β)·grads."""
    if beta > 0:
        grads.lerp_(average, beta)


def keep_(
    average: Tensor,  # (rows, d) written
    grads: Tensor,  # (rows, d) averages of this step
    cosines: Tensor,  # (rows,) of the transition: NaN where it found a gradient that is not finite
    alone: bool,  # a particle with such a gradient stays alone; otherwise all of them do
) -> None:
    """The averages are those of this step, where a particle has moved along it."""
    stays = cosines.isnan()
    torch.where(stays.unsqueeze(1) if alone else stays.any(), average, grads, out=average)

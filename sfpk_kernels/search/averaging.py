"""Gradients averaged over the last steps, so that what one mini-batch undoes of another does not move a particle."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from ..config import SFPKConfig
from ..ops import GradientStats
from .records import StepRecord

_LOOKS_BACK = 0.15  # fraction of the run over which agreements are averaged
_GAIN, _POWER = 2.0, 0.6  # empirical fits


def most(config: SFPKConfig) -> float:
    """The largest β there may be, 1 - 1/h with a horizon of h = averaging · K steps; 0 below 1: nothing is averaged."""
    return max(0.0, 1.0 - 1.0 / max(1.0, config.averaging * config.n_steps))


def staying(config: SFPKConfig, history: Sequence[StepRecord]) -> float:
    """β: what stays of the average in the next step, -2c within 0 and :func:`most`.

    c is the mean agreement (:attr:`Gradients.agreements`) in the last 0.15 K steps: gradients that point against what
    particles moved along say that moves overshoot. Those before the step count, which reach the host with everything
    else it reads of them, so nothing waits. 0 as long as there are none.
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


class Gradients:
    """What is measured of the gradients of a step while they are averaged, particle by particle; waits for nothing.

    Args:
        averaged: whether there are averages, with which they may agree.
        measured: whether their effective dimensions are asked for.
    """

    def __init__(self, averaged: bool, measured: bool):
        self.averaged, self.measured = averaged, measured
        self._seen: list[GradientStats] = []

    def add(self, stats: GradientStats) -> None:
        """Those of the next particles."""
        self._seen.append(stats)

    @property
    def agreements(self) -> Tensor:  # (n,) fp64
        """Cosines of θ ⊙ ∂L/∂W and θ times the average behind it, of all that were seen.

        NaN where either is zero, as in the first step, or not finite.
        """
        return torch.cat([stats.cosines for stats in self._seen])

    @property
    def shares(self) -> Tensor:  # (n,) fp64
        """Effective dimensions of all that were seen, as shares of d; NaN for zero and what is not finite."""
        return torch.cat([stats.effective_dimensions for stats in self._seen])

    @property
    def asked_for(self) -> dict[str, Tensor]:
        """What the record of a step has of them."""
        found = {}
        if self.measured:
            found["effective_dimensions"] = self.shares
        if self.averaged:
            found["agreements"] = self.agreements
        return found


def keep_(
    average: Tensor,  # (rows, d) written
    grads: Tensor,  # (rows, d) averages of this step
    cosines: Tensor,  # (rows,) of the transition: NaN where it found a gradient that is not finite
    alone: bool,  # a particle with such a gradient stays alone; otherwise all of them do
) -> None:
    """The averages are those of this step, where a particle has moved along it."""
    stays = cosines.isnan()
    if average.device.type != "cpu":  # the host does not wait to see
        torch.where(stays.unsqueeze(1) if alone else stays.any(), average, grads, out=average)
        return
    moved = [not one for one in stays.tolist()]
    if all(moved):
        average.copy_(grads)
    elif alone:
        for row in (i for i, one in enumerate(moved) if one):
            average[row].copy_(grads[row])

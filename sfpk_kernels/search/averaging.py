"""Gradients averaged over the last steps, so that what one mini-batch undoes of another does not move a particle."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import SFPKConfig

_POWER = 0.6  # an empirical fit, as the lengths themselves


def decay(config: SFPKConfig) -> float:
    """β: what is left of the average in the next step, 1 - 1/h with a horizon of h = averaging · K steps; 0 below 1."""
    return max(0.0, 1.0 - 1.0 / max(1.0, config.averaging * config.n_steps))


def shortening(config: SFPKConfig) -> float:
    """Factor on the angle of a move along an average, ((1 - β)/(1 + β))^0.6.

    The average of gradients that have nothing in common is sqrt((1 - β)/(1 + β)) times as long as one of them: moves
    along it add up to as much as moves along each. Those of successive steps point against each other in part.
    """
    beta = decay(config)
    return ((1.0 - beta) / (1.0 + beta)) ** _POWER


def blend_(
    grads: Tensor,  # (rows, d) of this step, written: averages
    average: Tensor,  # (rows, d) behind the step before
    beta: float,
) -> None:
    """grads ← β·average + (1 - β)·grads."""
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

"""Losses and gradients that are NaN or infinite: an error that names the particle, or a particle that stands still."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .config import SFPKConfig


def mark_nonfinite(
    energies: Tensor,  # (rows,)
    grads: Tensor,  # (rows, d)
    config: SFPKConfig,
    step: int,
    first: int = 0,  # particle of the first row
    skipped: int = 0,  # particles of this step that stand still already
) -> list[int]:
    """Particles to skip, their gradients made NaN all over, as ``config.nonfinite`` says.

    Raises:
        FloatingPointError: there are some, and the policy is ``"raise"``, or no particle of the step is left; the
            message names step and particle.
    """
    finite = torch.isfinite(energies)
    steep = None
    if bool(finite.all()) or config.nonfinite != "raise":
        # Row by row: no (n, d) temporary, and all threads at work. A NaN is both lowest and highest.
        extremes = torch.stack([torch.stack(torch.aminmax(row)) for row in grads])
        steep = extremes.abs().amax(dim=1)
        finite = finite & torch.isfinite(steep)
    if bool(finite.all()):
        return []
    bad = torch.nonzero(~finite).flatten().tolist()
    if config.nonfinite == "raise" or skipped + len(bad) == config.n_particles:
        what, value = "loss", float(energies[bad[0]])
        if steep is not None and math.isfinite(value):
            what, value = "gradient", float(steep[bad[0]])
        got = f"{value} in step {step}, particle {first + bad[0]}"
        raise FloatingPointError(f"loss_fn: wanted a finite {what}, got {got}")
    grads[bad] = float("nan")
    return [first + i for i in bad]

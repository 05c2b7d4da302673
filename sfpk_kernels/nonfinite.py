"""Losses and gradients that are NaN or infinite: an error that names the particle, or a particle that stands still."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import SFPKConfig


def mark_nonfinite(
    energies: Tensor,  # (rows,)
    grads: Tensor,  # (rows, d)
    config: SFPKConfig,
    step: int,
    first: int = 0,  # particle of the first row
) -> list[int]:
    """Particles to skip, their gradients made NaN all over, as ``config.nonfinite`` says.

    Raises:
        FloatingPointError: there are some, and the policy is ``"raise"``, or no particle is left; the message names
            step and particle.
    """
    finite = torch.isfinite(energies)
    what, value = "loss", energies
    if bool(finite.all()) or config.nonfinite != "raise":
        # Row by row: no (n, d) temporary, and all threads at work. A NaN is both lowest and highest.
        extremes = torch.stack([torch.stack(torch.aminmax(row)) for row in grads])
        steep = extremes.abs().amax(dim=1)
        if bool(finite.all()):
            what, value = "gradient", steep
        finite = finite & torch.isfinite(steep)
    if bool(finite.all()):
        return []
    bad = torch.nonzero(~finite).flatten().tolist()
    if config.nonfinite == "raise" or len(bad) == config.n_particles:
        got = f"{float(value[bad[0]])} in step {step}, particle {first + bad[0]}"
        raise FloatingPointError(f"loss_fn: wanted a finite {what}, got {got}")
    grads[bad] = float("nan")
    return [first + i for i in bad]

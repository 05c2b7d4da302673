"""Steps 2 to 7 of the method for all particles: energies and moves, together or one particle after the other.

Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import SFPKConfig
from ..ops import TransitionStats
from .averaging import Gradients
from .energy import ParticleEnergy
from .nonfinite import not_finite, spoil_
from .particles import ParticleSystem
from .polarizer import Polarized
from .unreached import Reached

Angle = Callable[[], float | None]  # of a move, asked for once its gradient is there; None where the radius says it


def by_radius() -> float | None:
    """No angle."""
    return None


def move_particles(
    config: SFPKConfig,
    energy: ParticleEnergy,
    system: ParticleSystem,
    keep: Polarized,
    batches: Sequence[Any],  # one per particle
    angle: Angle = by_radius,
    reached: Reached | None = None,
    gradients: Gradients | None = None,
    staying: float = 0.0,  # β: what stays of the averages, where gradients are looked at
) -> tuple[Tensor, TransitionStats]:  # energies (n,) fp64
    """In the order that ``config.update`` says; ``reached`` and ``gradients`` look at the gradients."""
    if config.update == "jacobi":
        return jacobi(energy, system, keep, batches, angle, reached, gradients, staying)
    skips = config.nonfinite == "skip_particle"
    return gauss_seidel(energy, system, keep, batches, skips, angle, reached, gradients, staying)


def jacobi(
    energy: ParticleEnergy,
    system: ParticleSystem,
    keep: Polarized,
    batches: Sequence[Any],  # one per particle
    angle: Angle = by_radius,
    reached: Reached | None = None,
    gradients: Gradients | None = None,
    staying: float = 0.0,  # β: what stays of the averages, where gradients are looked at
) -> tuple[Tensor, TransitionStats]:  # energies (n,) fp64
    """All particles move at once, from where all of them were; none where ``reached`` refuses the gradients."""
    energies, grads = energy(keep, batches)
    bad = not_finite(energies)
    if reached is not None:
        reached.observe(grads)
        bad = bad | reached.refused()
    if gradients is not None:
        gradients.add(system.average_(grads, staying=staying))
    spoil_(grads, bad)
    return energies, system.move_(grads, angle=angle())


def gauss_seidel(
    energy: ParticleEnergy,
    system: ParticleSystem,
    keep: Polarized,
    batches: Sequence[Any],
    skips: bool,  # config.nonfinite == "skip_particle"
    angle: Angle = by_radius,
    reached: Reached | None = None,
    gradients: Gradients | None = None,
    staying: float = 0.0,  # β: what stays of the averages, where gradients are looked at
) -> tuple[Tensor, TransitionStats]:
    """One particle after the other, each from where the ones before it have gone: one gradient in memory.

    Where no particle may be skipped, none moves behind one whose loss or gradient is not finite.
    """
    n = len(keep)
    energies = torch.empty(n, dtype=torch.float64, device=system.masks.device)
    cosines, grad = torch.zeros_like(energies), energy.buffer(1)
    bad = torch.zeros(1, dtype=torch.bool, device=energies.device)
    with energy.one_by_one():
        for i in range(n):
            row = slice(i, i + 1)
            energies[i] = energy.single(i, keep.rows(row), batches[i], grad[0])
            if reached is not None:
                reached.observe(grad)
            if gradients is not None:
                gradients.add(system.average_(grad, row=i, staying=staying))
            spoil_(grad, not_finite(energies[row]) if skips else bad | not_finite(energies[row]))
            stats = system.move_(grad, row=i, angle=angle())
            cosines[i] = stats.cosines[i]
            bad = bad | cosines[row].isnan()
    return energies, stats._replace(cosines=cosines)

"""What is kept of every step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class StepRecord:
    """What happened in one step; plain numbers, one value per particle in the lists."""

    step: int  # 1 … K
    scheduled_density: float  # ρ_k
    densities: list[float]  # soft density after the step
    energies: list[float]  # loss at the step's start, at the density of the step before
    cosines: list[float]  # cosine between the transition's move, before retraction and consensus, and -∂L/∂m
    seconds: float
    start_density: float = 1.0  # mean soft density at the step's start, which the energies belong to
    deviation: float = 0.0  # after the step: rms distance of the particles from their mean, over their rms norm
    overlaps: list[list[float]] = field(
        default_factory=list
    )  # (n, n) IoU of the binary masks the energies were taken at
    layer_densities: list[float] = field(
        default_factory=list
    )  # of those masks, mean over particles, by prunable tensor
    effective_dimensions: list[float] = field(
        default_factory=list
    )  # share of the coordinates that carry a gradient, by particle, where step_length asks for it; NaN: no gradient
    agreements: list[float] = field(
        default_factory=list
    )  # cosine of each particle's gradient and the average behind it, where gradients are averaged; NaN: one is zero
    skipped: list[int] = field(default_factory=list)  # particles that stood still: loss or gradient not finite
    alarms: list[str] = field(default_factory=list)

    @property
    def energy(self) -> float:
        """Mean energy of the particles, of those that have a finite one."""
        values = self._finite()
        return sum(values) / len(values) if values else math.nan

    @property
    def energy_std(self) -> float:
        """Standard deviation of the particles' energies (each on its own batch)."""
        values, mean = self._finite(), self.energy
        return math.sqrt(sum((v - mean) ** 2 for v in values) / len(values)) if values else math.nan

    @property
    def energy_min(self) -> float:
        """Lowest energy."""
        return min(self._finite(), default=math.nan)

    @property
    def density(self) -> float:
        """Mean soft density of the particles."""
        return sum(self.densities) / len(self.densities)

    @property
    def mean_overlap(self) -> float:
        """Mean IoU of two different particles' binary masks; 1 for a single particle."""
        n = len(self.overlaps)
        if n < 2:
            return 1.0
        return (sum(map(sum, self.overlaps)) - n) / (n * (n - 1))

    @property
    def effective_particles(self) -> float:
        """n² / Σ IoU_ij²: 1 where all binary masks are alike, n where no two share a weight."""
        n = len(self.overlaps)
        return n * n / sum(v * v for row in self.overlaps for v in row) if n else 1.0

    def _finite(self) -> list[float]:
        return [value for value in self.energies if math.isfinite(value)]


def curve_of(history: Iterable[StepRecord]) -> list[dict[str, float]]:
    """Loss over the soft sparsity at each step's start: one point per step, each particle on its own batch."""
    return [
        {
            "sparsity": 1.0 - record.start_density,
            "energy": record.energy,
            "std": record.energy_std,
            "lowest": record.energy_min,
            "highest": max((e for e in record.energies if math.isfinite(e)), default=math.nan),
        }
        for record in history
    ]

"""Several particles become one: after which step, what a run with it costs, and what the one is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..config import SFPKConfig
from ..utils.arguments import check_least
from .records import StepRecord
from .schedule import steps_within

_PART = 1 << 18  # elements in fp64 at once


def steps_of_all(config: SFPKConfig) -> int:
    """M: how many steps all n particles take; K where they are never merged."""
    if config.merge is None or config.n_particles == 1:
        return config.n_steps
    return steps_within(config.n_steps, config.merge)


def particles_after(config: SFPKConfig, step: int) -> int:
    """How many particles there are when so many steps are done, from 0 to K."""
    before = steps_of_all(config)
    return config.n_particles if step < before or before >= config.n_steps else 1


def passes(config: SFPKConfig, step: int | None = None) -> int:
    """Forward and backward passes of so many steps; of the whole run, n·M + (K - M), without."""
    step = config.n_steps if step is None else step
    before = min(step, steps_of_all(config))
    return config.n_particles * before + step - before


def with_passes(config: SFPKConfig, count: int) -> SFPKConfig:
    """The settings with as many steps as ``count`` passes allow; what is left over is less than a step of all.

    Raises:
        TypeError: a count that is no integer.
        ValueError: fewer passes than one step takes.
    """
    check_least("passes", count, config.n_particles)
    steps = count
    while passes(longer := config.replace(n_steps=steps)) > count:
        # Every step is one pass at least: one step fewer for each n that are too many, and never too many fewer.
        steps -= max(1, (passes(longer) - count) // config.n_particles)
    return longer


def mean_square(config: SFPKConfig, density: float) -> float:
    """Σm²/D of a particle with that soft density."""
    return density**2 if config.density == "l2" else density


def energies_of(
    records: Sequence[StepRecord], config: SFPKConfig, device: torch.device | str = "cpu"
) -> Tensor:  # (n,) fp64
    """Of the particles as they stand after the last of some steps: where they were merged since, the mean of it."""
    last = records[-1]
    if particles_after(config, last.step) < len(last.energies):
        return torch.full((1,), last.energy, dtype=torch.float64, device=device)  # waits for nothing
    return torch.tensor(last.energies, dtype=torch.float64, device=device)


@torch.no_grad()
def merge_into(
    target: Tensor,  # (1, d) written, in the dtype of the particles
    target_residual: Tensor | None,  # (1, d) written, beside bf16 particles
    masks: Tensor,  # (n, d)
    residual: Tensor | None,  # (n, d) what rounding took from bf16 particles
    square: float | None = None,  # Σm²/D that the one shall have; None for that of the mean as it is
) -> None:
    """The mean of the particles, in fp64 and rounded once, to nearest; a mean of zeros stays. Waits for nothing.

    The mean of particles that differ is shorter than they are, so it has left the schedule: ``square`` scales it back.
    """
    factor = torch.ones((), dtype=torch.float64, device=masks.device)
    if square is not None:
        total = torch.zeros_like(factor)
        for _, mean in _means(masks, residual):
            total += mean.square().sum()
        factor = (square * masks.shape[1] / total).sqrt()
        factor = torch.where(factor.isfinite(), factor, 1.0)
    for columns, mean in _means(masks, residual):
        mean *= factor
        target[0, columns] = mean.to(target.dtype)
        if target_residual is not None:
            target_residual[0, columns] = (mean - target[0, columns]).to(target_residual.dtype)


def _means(masks: Tensor, residual: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Mean particle in fp64, some coordinates at a time: all of them would be four times the particles' size."""
    n, d = masks.shape
    width = max(1, _PART // n)
    for begin in range(0, d, width):
        columns = slice(begin, min(begin + width, d))
        values = masks[:, columns].double()
        if residual is not None:
            values += residual[:, columns]
        yield columns, values.mean(dim=0)

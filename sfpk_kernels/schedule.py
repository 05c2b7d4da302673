"""Density schedules: how the soft density falls from 1 to the target over the K steps."""

from __future__ import annotations

from collections.abc import Callable

_SCHEDULES: dict[str, Callable[[float, float, float], float]] = {
    # (start ρ_0, target ρ_K, progress k/K in [0, 1]) -> ρ_k
    "exponential": lambda start, target, progress: start * (target / start) ** progress,
    "linear": lambda start, target, progress: start - (start - target) * progress,
    "cubic": lambda start, target, progress: target + (start - target) * (1.0 - progress) ** 3,
}


def density_schedule(
    name: str,
    target: float,  # ρ_K in (0, 1)
    n_steps: int,  # K ≥ 1
    start: float = 1.0,  # ρ_0 > ρ_K
) -> list[float]:  # K + 1 densities: ρ_0 = start, …, ρ_K = target, strictly falling
    """The densities a run passes; step k moves every particle by Δt_k = ρ_{k-1} - ρ_k.

    From ρ_0 = 1, ``"exponential"``: ρ_K^(k/K) (authors); ``"linear"``: 1 - (1 - ρ_K) k/K (paper); ``"cubic"``:
    ρ_K + (1 - ρ_K)(1 - k/K)³ (ours: most of the removal early, small steps near the target).

    Raises:
        ValueError: an unknown name, a target outside (0, 1), a start at or below it, or fewer than one step.
    """
    if name not in _SCHEDULES:
        raise ValueError(f"density_schedule: name: wanted one of {', '.join(_SCHEDULES)}, got {name!r}")
    if not 0 < target < 1:
        raise ValueError(f"density_schedule: target: wanted a density in (0, 1), got {target!r}")
    if not start > target:
        raise ValueError(f"density_schedule: start: wanted a density above the target {target!r}, got {start!r}")
    if n_steps < 1:
        raise ValueError(f"density_schedule: n_steps: wanted ≥ 1, got {n_steps!r}")
    rule = _SCHEDULES[name]
    return [start, *(rule(start, target, k / n_steps) for k in range(1, n_steps)), target]

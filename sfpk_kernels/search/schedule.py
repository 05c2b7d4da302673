"""Density schedules: how the soft density falls from 1 to the target over the K steps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

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
    stops: Sequence[float] = (),  # densities in between, falling
    hold: float = 1.0,  # fraction of the run after which the target is reached, in (0, 1]
) -> list[float]:  # K + 1 densities: ρ_0 = start, …, ρ_K = target, strictly falling until it is reached
    """The densities a run passes; step k moves every particle by Δt_k = ρ_{k-1} - ρ_k.

    From ρ_0 = 1, ``"exponential"``: ρ_K^(k/K) (authors); ``"linear"``: 1 - (1 - ρ_K) k/K (paper); ``"cubic"``:
    ρ_K + (1 - ρ_K)(1 - k/K)³ (ours: most of the removal early, small steps near the target). With ``hold`` the same of
    min(1, k/(hold·K)) in place of k/K.

    With ``stops`` the rule runs from ρ_0 to the first of them, from there to the next, and so on; every part gets steps
    in proportion to the logarithm of its fall, at least one.

    Raises:
        ValueError: an unknown name, a target outside (0, 1), a start at or below it, fewer than one step, or than one
            for every part; stops that do not fall from start to target; a hold outside (0, 1].
    """
    if name not in _SCHEDULES:
        raise ValueError(f"density_schedule: name: wanted one of {', '.join(_SCHEDULES)}, got {name!r}")
    if not 0 < target < 1:
        raise ValueError(f"density_schedule: target: wanted a density in (0, 1), got {target!r}")
    if not start > target:
        raise ValueError(f"density_schedule: start: wanted a density above the target {target!r}, got {start!r}")
    if n_steps < 1:
        raise ValueError(f"density_schedule: n_steps: wanted ≥ 1, got {n_steps!r}")
    if not 0 < hold <= 1:
        raise ValueError(f"density_schedule: hold: wanted a fraction in (0, 1], got {hold!r}")
    rule, corners = _SCHEDULES[name], [start, *stops, target]
    if any(a <= b for a, b in itertools.pairwise(corners)):
        raise ValueError(
            f"density_schedule: stops: wanted densities that fall from {start:g} to {target:g}, got {list(stops)}"
        )
    steps = steps_within(n_steps, hold)
    if steps < len(corners) - 1:
        before = "" if steps == n_steps else " before the hold"
        raise ValueError(
            f"density_schedule: n_steps: wanted ≥ {len(corners) - 1}, one for every part, got {steps}{before}"
        )
    densities, whole = [start], math.log(start / target)
    for part, (first, last) in enumerate(itertools.pairwise(corners), start=1):
        done = len(densities) - 1
        end = round(steps * math.log(start / last) / whole)
        # One step at least, for each that follows, too.
        end = min(max(end, done + 1), steps - (len(corners) - 1 - part))
        length = hold * n_steps - done if last == target else end - done  # the target is reached between two steps
        densities += [*(rule(first, last, k / length) for k in range(1, end - done)), last]
    return densities + [target] * (n_steps - steps)


def steps_within(n_steps: int, fraction: float) -> int:
    """How many steps begin before that fraction of a run is over, at least one.

    Of a run that holds its target from there on, these lower the density.
    """
    return max(1, math.ceil(fraction * n_steps - 1e-9))  # 0.7 · 10 may be a little above 7

"""How far a particle moves along its tangential gradient in a step."""

from __future__ import annotations

import math

from ..config import SFPKConfig

# An empirical fit, flat: half and twice of it gave about the same masks.
_GAMMA, _POWER = 0.035, 1.5


def angle_of_step(
    config: SFPKConfig,
    start: float,  # ρ_0
    step: int,  # k: steps done before it, 0 … K - 1
) -> float | None:
    """α_k = γ ln(ρ_0/ρ_K)^(3/2) (1 - k/K) of ``step_length="angle"``; None where the radius says it.

    The density change of the step does not enter, so the sum over a run grows with K: more passes explore further.
    """
    if config.step_length == "radius":
        return None
    fall = math.log(start / config.target_density)
    return _GAMMA * fall**_POWER * (1.0 - step / config.n_steps)

"""How far a particle moves along its tangential gradient in a step, where the radius does not say it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from ..config import SFPKConfig
from .averaging import Gradients, shortening
from .reading import read_together
from .records import StepRecord

# Empirical fits: half and twice of either factor were a little worse in most trials.
_ANGLE, _ANGLE_POWER = 0.035, 1.5
_SHARE, _SHARE_POWER = 0.33, 2.0
_START = 0.15  # fraction of the run in which gradients are looked at, and moves grow to their length


class StepLength:
    """The angle α_k of every step, of ``step_length="angle"`` or ``"effective_dimension"``.

    The density change of the step does not enter, so the sum over a run grows with K: more passes explore further.

    ``"angle"``: α_k = γ ln(ρ_0/ρ_K)^(3/2) (1 - k/K), γ = 0.035.

    ``"effective_dimension"``: α_k = 0.33 ln(ρ_0/ρ_K)² sqrt(δ) (1 - k/K) min(1, (k + 1)/(0.15 K)), δ the geometric mean
    of the effective dimensions (:class:`~sfpk_kernels.ops.GradientStats`) in the first 0.15 K steps, of those before
    step k: they reach the host with everything else it reads of a step, so nothing waits. Until there is one (in the
    first step, and behind a gradient of zero) that of the step itself, for which it does wait. The gradients of a
    network that is still nearly dense are mostly noise, which many coordinates share: hence the slow beginning.

    Args:
        config: of the run.
        history: of the run, which grows with it.
    """

    def __init__(self, config: SFPKConfig, history: Sequence[StepRecord]):
        self._config, self._history = config, history

    def looks_at(self, step: int) -> bool:  # k: steps done, 0 … K - 1
        """Whether the effective dimensions of this step's gradients are asked for."""
        return self._config.step_length == "effective_dimension" and step < self._looked_at

    def angle(
        self,
        step: int,  # k: steps done, 0 … K - 1
        start: float,  # ρ_0
        now: Gradients | None = None,  # of this step's gradients, as far as they are known
        staying: float = 0.0,  # β of this step
    ) -> float | None:
        """α_k; None where the radius says it."""
        config = self._config
        if config.step_length == "radius":
            return None
        fall = math.log(start / config.target_density)
        left = config.step_scale * shortening(staying) * (1.0 - step / config.n_steps)
        if config.step_length == "angle":
            return _ANGLE * fall**_ANGLE_POWER * left
        share = _mean(record.effective_dimensions for record in self._history[: self._looked_at])
        if share is None and now is not None:
            share = _mean([read_together(shares=now.shares)["shares"]])
        # Without any there is nothing to follow: gradients that are zero, or not finite.
        grown = min(1.0, (step + 1) / (_START * config.n_steps))
        return 0.0 if share is None else _SHARE * fall**_SHARE_POWER * math.sqrt(share) * left * grown

    @property
    def _looked_at(self) -> int:
        return math.ceil(_START * self._config.n_steps)


def _mean(steps: Iterable[Sequence[float]]) -> float | None:
    """Geometric mean over steps, each that of its particles; None where none has an effective dimension."""
    logs = [[math.log(share) for share in shares if math.isfinite(share)] for shares in steps]
    means = [statistics.fmean(values) for values in logs if values]
    return math.exp(statistics.fmean(means)) if means else None

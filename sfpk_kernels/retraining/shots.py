"""The shots of gradual pruning: what each does, and what happened in it."""

from __future__ import annotations

import dataclasses
import numbers
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from ..config import SFPKConfig
from ..export.measure import Latency
from ..masks.maskset import MaskSet
from ..search.merging import steps_of_all
from ..search.records import StepRecord


@dataclasses.dataclass(frozen=True)
class Shot:
    """What one shot does."""

    number: int  # 1 … T
    shots: int  # T
    start_density: float  # fraction kept before it
    density: float  # fraction kept after it
    n_steps: int  # of the search
    share: float  # of the retraining budget; those of all shots add up to 1

    @property
    def sparsity(self) -> float:
        """Fraction removed after it."""
        return 1.0 - self.density


@dataclasses.dataclass(frozen=True)
class ShotRecord:
    """What happened in one shot."""

    shot: Shot
    kept: int  # weights
    returned: int  # weights that an earlier shot had removed and this one kept
    search: list[StepRecord]
    losses: list[float]  # of every retraining step; empty where a function of your own retrains


@dataclasses.dataclass(frozen=True)
class GradualResult:
    """Outcome of a gradual run; the model holds the retrained weights."""

    mask: MaskSet  # the final mask
    masks: list[MaskSet]  # after every shot; its weights were those retrained up to there
    history: list[ShotRecord]
    particles: Tensor  # (n, d), (1, d) once merged; on the CPU
    config: SFPKConfig

    def __repr__(self) -> str:
        return f"GradualResult({self.mask!r}, {len(self.history)} shots, {len(self.particles)} particles)"

    @property
    def alarms(self) -> list[str]:
        """What looked wrong in the searches, with shot and step."""
        return [
            f"shot {one.shot.number}, step {record.step}: {words}"
            for one in self.history
            for record in one.search
            for words in record.alarms
        ]

    def summary(self) -> dict[str, Any]:
        """The outcome in a few plain numbers; seconds and steps are those of the searches."""
        steps = [record for one in self.history for record in one.search]
        return {
            "sparsity": self.mask.sparsity,
            "kept": self.mask.kept,
            "prunable": self.mask.prunable,
            "fingerprint": self.mask.fingerprint(),
            "shots": len(self.history),
            "steps": len(steps),
            "seconds": sum(record.seconds for record in steps),
            "energy": steps[-1].energy,
            "alarms": self.alarms,
        }

    def report(
        self,
        folder: str | os.PathLike[str],
        baselines: Sequence[Mapping[str, Any]] = (),
        dense_accuracy: float | None = None,
        *,
        dense_eval: float | Mapping[str, float] | None = None,
        shot_evals: Sequence[float | Mapping[str, float]] = (),
        pruned_eval: float | Mapping[str, float] | None = None,
        latency: Sequence[Latency] = (),
    ) -> Path:
        """Write report.json, report.html and pictures; see :func:`sfpk_kernels.report.write_gradual`."""
        from ..report import write_gradual  # here, not above: a report reads a result, which does without reports

        evaluations = {"dense_eval": dense_eval, "pruned_eval": pruned_eval}
        return write_gradual(
            self, folder, baselines, dense_accuracy, **evaluations, shot_evals=shot_evals, latency=latency
        )


def schedule_shots(
    config: SFPKConfig,
    shots: int,
    growth: float | None = None,
) -> list[Shot]:
    """Densities, search steps and retraining shares of T shots to sparsity s.

    Density after shot i: ρ_i = (1 - s)^(i/T), so every shot keeps the same fraction of what was left. Search steps: K
    in all, spread evenly. Retraining: shot i gets g^(i-1)·(g - 1)/(g^T - 1) of the total budget, which rises
    exponentially and adds up to 1; with the default g = (1 - s)^(-1/T) it is inversely proportional to the density.

    Args:
        config: of the whole run; K = ``n_steps``.
        shots: T ≥ 1, at most K.
        growth: g ≥ 1 (1: the same budget for every shot); ``None`` for the default.

    Raises:
        TypeError, ValueError: a bad ``shots`` or ``growth``.
    """
    if isinstance(shots, bool) or not isinstance(shots, numbers.Integral):
        raise TypeError(f"shots: wanted an integer ≥ 1, got {shots!r}")
    if not 1 <= shots <= config.n_steps:
        raise ValueError(f"shots: wanted 1 … {config.n_steps} (at most config.n_steps), got {shots!r}")
    if growth is not None and (isinstance(growth, bool) or not isinstance(growth, numbers.Real)):
        raise TypeError(f"growth: wanted a number ≥ 1 or None, got {growth!r}")
    if growth is not None and not 1 <= growth < float("inf"):
        raise ValueError(f"growth: wanted a number ≥ 1 or None, got {growth!r}")
    total, kept = int(shots), config.target_density
    g = kept ** (-1 / total) if growth is None else float(growth)
    densities = [kept ** (i / total) for i in range(total)] + [kept]
    steps = [_steps_before(config, i, total) for i in range(total + 1)]
    weights = [g ** (i - total) for i in range(total)]
    return [
        Shot(i + 1, total, densities[i], densities[i + 1], steps[i + 1] - steps[i], weights[i] / sum(weights))
        for i in range(total)
    ]


class PartwayConfig(SFPKConfig):
    """Settings of a search that others go on from: it may keep more than N of every M, or less than a sparsity says."""

    partway: ClassVar[bool] = True


def config_of_shot(config: SFPKConfig, shot: Shot, seed: int) -> SFPKConfig:
    """The search of one shot of the run that ``config`` describes.

    ``merge`` counts in steps of all shots together: those before have n particles, those behind one. A pattern is
    reached in the last shot; in those before no group keeps fewer than its N best.
    """
    last = shot.number == shot.shots  # without the rounding of 1 - (1 - s)
    left = steps_of_all(config) - _steps_before(config, shot.number - 1, shot.shots)  # of all particles
    kind = SFPKConfig if last else PartwayConfig
    changes = {
        "sparsity": config.sparsity if last else shot.sparsity,
        "n_steps": shot.n_steps,
        "n_particles": config.n_particles if left > 0 else 1,
        "merge": left / shot.n_steps if 0 < left < shot.n_steps else None,
        "seed": seed,
    }
    return kind(**{**config.to_dict(), **changes})


def _steps_before(config: SFPKConfig, shots: int, total: int) -> int:
    """Search steps of the first so many shots."""
    return round(config.n_steps * shots / total)


def spread_steps(total: int, shares: list[float]) -> list[int]:
    """Whole numbers with the sum ``total``, cumulatively rounded."""
    ends = [round(total * sum(shares[: i + 1])) for i in range(len(shares))]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]

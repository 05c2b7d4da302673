"""What trackers are told of a run: numbers of a step, numbers of its end, by the same names in each of them."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

from ..masks.maskset import MaskSet
from ..search.records import StepRecord
from ..search.result import PruneResult

Evaluation = float | Mapping[str, float] | None


def of_step(record: StepRecord, layers: list[str] | None = None) -> dict[str, float]:
    """Loss, densities and the number of alarms of a step; of ``layers`` too, where their names are known.

    What is not finite is left out: no tracker draws it, and some refuse it.
    """
    found = {
        "sfpk/energy": record.energy,
        "sfpk/energy_std": record.energy_std,
        "sfpk/density": record.density,
        "sfpk/scheduled_density": record.scheduled_density,
        "sfpk/alarms": len(record.alarms),
        "sfpk/seconds": record.seconds,
    }
    if layers is not None and len(layers) == len(record.layer_densities):
        found |= {
            f"sfpk/layer_density/{name}": value for name, value in zip(layers, record.layer_densities, strict=True)
        }
    return {name: float(value) for name, value in found.items() if math.isfinite(value)}


def of_end(result: PruneResult | MaskSet, evaluation: Evaluation) -> dict[str, float]:
    """Sparsity, kept weights and alarms of a run or a mask, and an evaluation, one number as ``eval``.

    Raises:
        TypeError: neither result nor masks, or an evaluation that is no number and no numbers by name.
    """
    mask = getattr(result, "mask", result)
    if not isinstance(mask, MaskSet):
        raise TypeError(f"result: wanted a PruneResult or a MaskSet, got {type(result).__name__}")
    found: dict[str, Any] = {"sfpk/sparsity": mask.sparsity, "sfpk/kept": mask.kept, "sfpk/prunable": mask.prunable}
    if isinstance(result, PruneResult):
        found["sfpk/alarms_in_all"] = len(result.alarms)
    values = evaluation if isinstance(evaluation, Mapping) else {} if evaluation is None else {"eval": evaluation}
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"evaluation: wanted a number, or numbers by name, got {name} {value!r:.80}")
        found[f"sfpk/evaluation/{name}"] = value
    return {name: float(value) for name, value in found.items()}

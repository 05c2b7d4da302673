"""What report.json holds of a gradual run: its shots, and what a run's report has."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from .._version import __version__
from ..retraining.shots import GradualResult, ShotRecord
from ..retraining.structured_shots import StructuredGradualResult
from ..search.records import curve_of
from .contents import FORMAT, checked_evaluation, layers_of, steps_of


def collect_gradual(
    result: GradualResult,
    baselines: Sequence[Mapping[str, Any]],
    dense_accuracy: float | None,
    evaluation: Mapping[str, Mapping[str, float]],
    shot_evals: Sequence[Mapping[str, float]],  # of every shot, or none
    latency: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """All of the report; what only a run in one shot has, its plan and its knee, is empty."""
    shots = [_shot(result, i, record) for i, record in enumerate(result.history)]
    for shot, found in zip(shots, shot_evals, strict=bool(shot_evals)):
        shot["evaluation"] = dict(found)
    offsets = [sum(len(one.search) for one in result.history[:i]) for i in range(len(result.history))]
    steps = [
        dataclasses.replace(record, step=first + record.step)
        for first, one in zip(offsets, result.history, strict=True)
        for record in one.search
    ]
    return {
        "format": FORMAT,
        "version": __version__,
        "summary": result.summary(),
        "config": result.config.to_dict(),
        "plan": {},
        "shots": shots,
        "curve": curve_of(steps),
        "knee": None,
        "waypoints": [
            {
                "sparsity": one.shot.sparsity,
                "step": first + len(one.search),
                "kept": mask.kept,
                "fingerprint": mask.fingerprint(),
                "layer_densities": mask.layer_densities(),
            }
            for one, first, mask in list(zip(result.history, offsets, result.masks, strict=True))[:-1]
        ],
        **layers_of(result.mask),
        "history": steps_of(steps),
        "baselines": [dict(row) for row in baselines],
        "dense_accuracy": dense_accuracy,
        "evaluation": {which: dict(values) for which, values in evaluation.items()},
        "latency": [dict(row) for row in latency],
    }


def _shot(result: GradualResult, i: int, record: ShotRecord) -> dict[str, Any]:
    """A row: what was removed, and the losses at the end of search and retraining."""
    last = record.losses[-max(1, len(record.losses) // 10) :]
    found = {
        "number": record.shot.number,
        "sparsity": record.shot.sparsity,
        "kept": record.kept,
        "returned": record.returned,
        "steps": len(record.search),
        "search_loss": record.search[-1].energy,
        "retraining_steps": len(record.losses),
        "retraining_loss": sum(last) / len(last) if last else None,
        "fingerprint": result.masks[i].fingerprint(),
    }
    return {**found, "costs": dict(result.costs[i])} if isinstance(result, StructuredGradualResult) else found


def checked_shot_evals(values: Any, shots: int) -> list[dict[str, float]]:
    """Evaluations after every shot, as numbers by name.

    Raises:
        TypeError: no list of numbers, or of dicts of them.
        ValueError: of another number of shots.
    """
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise TypeError(f"shot_evals: wanted a list of evaluations, one a shot, got {type(values).__name__}")
    if values and len(values) != shots:
        raise ValueError(f"shot_evals: wanted {shots}, one a shot, or none, got {len(values)}")
    return [checked_evaluation(f"shot_evals[{i}]", value) for i, value in enumerate(values)]

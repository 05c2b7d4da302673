"""What report.json holds: the numbers of a result, and what was measured besides."""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .._version import __version__
from ..config import SFPKConfig
from ..coordinates.flat import Coordinates
from ..execution import Execution
from ..export.measure import Latency
from ..masks.maskset import MaskSet
from ..search.planning import Plan
from ..search.records import StepRecord
from ..search.waypoints import Waypoint
from ..utils.plain import plain

FORMAT = "sfpk-report-1"
PARTS = {
    "version", "summary", "config", "plan", "curve", "knee", "waypoints", "layer_densities", "layer_sizes", "history",
    "baselines", "dense_accuracy",
}  # that every report has; "model", "evaluation", "execution", "latency" came later; "method" is no run's  # fmt: skip

Evaluation = float | Mapping[str, float]  # what an eval_fn says of a model: a number, or numbers by name


class Reported(Protocol):
    """What is read of a result. Its module is not imported, which knows this package: imports go one way."""

    @property
    def mask(self) -> MaskSet:
        """The final mask."""

    @property
    def history(self) -> list[StepRecord]:
        """An entry per step."""

    @property
    def config(self) -> SFPKConfig:
        """What decided the mask."""

    @property
    def execution(self) -> Execution:
        """How it was computed."""

    @property
    def coordinates(self) -> Coordinates:
        """What was pruned, and what was not."""

    @property
    def plan(self) -> Plan:
        """The plan."""

    @property
    def waypoints(self) -> list[Waypoint]:
        """Masks on the way."""

    def summary(self) -> Mapping[str, Any]:
        """The outcome in a few plain numbers."""

    def curve(self) -> list[dict[str, float]]:
        """Loss over sparsity."""

    def knee(self) -> float | None:
        """Where the loss turns up."""


@dataclass(frozen=True)
class MethodResult:
    """A mask that another method than the search has found."""

    method: str  # a name in sfpk_kernels.baselines
    options: Mapping[str, Any]  # it was called with, sparsity included
    mask: MaskSet
    coordinates: Coordinates
    seconds: float

    def summary(self) -> dict[str, Any]:
        """The outcome in a few plain numbers."""
        return {
            "method": self.method,
            "sparsity": self.mask.sparsity,
            "model_sparsity": self.mask.share_removed(self.coordinates.beside),
            "kept": self.mask.kept,
            "prunable": self.mask.prunable,
            "fingerprint": self.mask.fingerprint(),
            "seconds": self.seconds,
            "alarms": [],
        }


def collect_method(result: MethodResult, evaluation: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """All of a report without a run: what a run alone has is empty."""
    return {
        "format": FORMAT,
        "version": __version__,
        "method": result.method,
        "summary": result.summary(),
        "config": dict(result.options),
        "plan": {},
        "model": _model(result.mask, result.coordinates),
        "curve": [],
        "knee": None,
        "waypoints": [],
        **_layers(result.mask),
        "history": [],
        "baselines": [],
        "dense_accuracy": None,
        "evaluation": {which: dict(values) for which, values in evaluation.items()},
    }


def _layers(mask: MaskSet) -> dict[str, Any]:
    return {
        "layer_densities": mask.layer_densities(),
        "layer_sizes": {name: math.prod(shape) for name, shape in mask.shapes.items()},
    }


def collect(
    result: Reported,
    baselines: Sequence[Mapping[str, Any]],
    dense_accuracy: float | None,
    evaluation: Mapping[str, Mapping[str, float]],
    latency: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """All of a report; the last four checked by the functions below."""
    derived = ("energy", "energy_std", "energy_min", "mean_overlap", "effective_particles")
    return {
        "format": FORMAT,
        "version": __version__,
        "summary": dict(result.summary()),
        "config": result.config.to_dict(),
        "execution": result.execution.to_dict(),
        "plan": result.plan.to_dict(),
        "model": _model(result.mask, result.coordinates),
        "curve": result.curve(),
        "knee": result.knee(),
        "waypoints": [
            {
                "sparsity": w.sparsity,
                "step": w.step,
                "kept": w.mask.kept,
                "fingerprint": w.mask.fingerprint(),
                "layer_densities": w.mask.layer_densities(),
            }
            for w in result.waypoints
        ],
        **_layers(result.mask),
        "history": [
            {**dataclasses.asdict(record), **{name: getattr(record, name) for name in derived}}
            for record in result.history
        ],
        "baselines": [dict(row) for row in baselines],
        "dense_accuracy": dense_accuracy,
        "evaluation": {which: dict(values) for which, values in evaluation.items()},
        "latency": [dict(row) for row in latency],
    }


def _model(mask: MaskSet, coordinates: Coordinates) -> dict[str, Any]:
    """How much of the whole model the masks cover, and what they leave alone, by reason."""
    left: dict[str, dict[str, int]] = {}
    for skip in coordinates.skipped:
        entry = left.setdefault(skip.reason, {"tensors": 0, "parameters": 0})
        entry["tensors"] += 1
        entry["parameters"] += skip.numel
    beside = coordinates.beside
    return {
        "parameters": mask.prunable + beside,
        "prunable": mask.prunable,
        "sparsity": mask.share_removed(beside),
        "left_alone": left,
    }


def before_the_merge(history: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """The steps of all particles; all steps where they were never merged, or are one."""
    n = len(history[0]["energies"]) if history else 0
    return [step for step in history if len(step["energies"]) == n]


def checked_row(row: Any) -> dict[str, Any]:
    """A row of ``baselines``, its numbers as Python's.

    Raises:
        TypeError: something that JSON cannot hold.
        ValueError: something is missing, or a number is no fraction.
    """
    missing = {"method", "sparsity", "accuracy_mean"} - (row.keys() if isinstance(row, Mapping) else set())
    if missing:
        raise ValueError(
            f"baselines: wanted rows with method, sparsity and accuracy_mean, got one without {sorted(missing)}"
        )
    if not isinstance(row["method"], str):
        raise TypeError(f"baselines: method: wanted a name, got {row['method']!r}")
    known = {name: row[name] for name in ("sparsity", "accuracy_mean", "accuracy_std") if name in row}
    row = {**row, **{name: checked_fraction(f"baselines: {name}", value) for name, value in known.items()}}
    for name, value in row.items():
        try:
            json.dumps({name: plain(value)})
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"baselines: {name}: wanted numbers, text, lists and dicts of them, got {value!r}"
            ) from error
    return row


def checked_fraction(what: str, value: Any) -> float:
    """A number in [0, 1]; also as a tensor or array without dimensions.

    Raises:
        ValueError: anything else.
    """
    number = _scalar(value)
    if not isinstance(number, numbers.Real) or not 0 <= float(number) <= 1:
        raise ValueError(f"{what}: wanted a fraction in [0, 1], got {value!r}")
    return float(number)


def checked_evaluation(what: str, value: Any) -> dict[str, float]:
    """A number, or numbers by name, as numbers by name.

    Raises:
        TypeError: anything else.
    """
    by_name = value if isinstance(value, Mapping) else {"evaluation": value}
    found = {name: _scalar(number) for name, number in by_name.items()}
    for name, number in found.items():
        if not isinstance(name, str) or isinstance(number, bool) or not isinstance(number, numbers.Real):
            raise TypeError(f"{what}: wanted a number or a dict of numbers by name, got {value!r}")
    return {name: float(number) for name, number in found.items()}


def checked_latency(rows: Any) -> list[dict[str, Any]]:
    """Rows of plain numbers and text.

    Raises:
        TypeError: something else than a list of :class:`Latency`.
    """
    for row in rows if isinstance(rows, Sequence) else [rows]:
        if not isinstance(row, Latency):
            raise TypeError(f"latency: wanted rows of StructuredResult.latency, got {type(row).__name__}")
    return [{**dataclasses.asdict(row), "speedup": row.speedup} for row in rows]


def _scalar(value: Any) -> Any:
    return value.item() if getattr(value, "ndim", None) == 0 else value

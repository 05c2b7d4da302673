"""What a saved run holds beside its parts: settings, records, the plan, in the words of every version."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import WITHOUT, SFPKConfig
from ..execution import ENERGY_MODES, Execution
from . import state_checks as check
from .averaging import most
from .merging import energies_of, particles_after, passes
from .planning import Plan
from .records import StepRecord
from .step_length import StepLength

KIND = "sfpk-run-2"  # format and version

# Settings that may change between parts of a run: a new seed makes a branch; a limit decides nothing but refusal.
_FREE = ("seed", "memory_limit")

_PARTS = {
    "model", "structure", "config", "names", "step", "particles", "vote", "energies", "history", "waypoints", "alarms",
    "taken", "scale", "plan",
}  # fmt: skip


def settings(config: SFPKConfig, execution: Execution) -> str:
    """All settings of a run, as JSON."""
    return json.dumps({**config.to_dict(), **execution.to_dict()}, indent=2)


def settings_of_this_version(settings: Any, kept: str | None = None) -> Any:
    """Settings by name in the words of this version: what was called ``memory`` once is ``update`` now.

    Those that there were none of then are what runs did.

    Args:
        settings: those of a file; what is no dict is returned as it is.
        kept: what the run's plan says of ``memory``.
    """
    if not isinstance(settings, dict):
        return settings
    settings = {**WITHOUT, **settings}
    if "memory" not in settings:
        return settings
    kept = kept or settings["memory"]
    others = {name: value for name, value in settings.items() if name != "memory"}
    return {**others, "update": "gauss_seidel" if kept == "lean" else "jacobi"}


def records_of_this_version(records: Any, settings: Any) -> Any:
    """Records of steps with every field of this version; ``settings`` of their run as the file has them."""
    if not isinstance(records, list | tuple) or not isinstance(settings, dict):
        return records
    came_with = {"effective_dimensions": "step_scale", "agreements": "averaging"}
    missing: dict[str, Any] = {name: [] for name, setting in came_with.items() if setting not in settings}
    return [{**missing, **value} if isinstance(value, Mapping) else value for value in records]


def of_this_version(state: Any) -> Any:
    """A state in the words of this version; what is none, or is damaged, as it is: who reads it says what is wrong."""
    if not isinstance(state, Mapping) or not isinstance(state.get("config"), str):
        return state
    try:
        config = json.loads(state["config"])
    except json.JSONDecodeError:
        return state
    if not isinstance(config, dict):
        return state
    if "granularity" not in config:
        state = {"structure": None, **state}
    if "history" in state:
        state = {**state, "history": records_of_this_version(state["history"], config)}
    if "averaging" not in config and isinstance(state.get("particles"), Mapping):
        state = {**state, "particles": {"average": None, **state["particles"]}}
    plan = state.get("plan")
    n, steps = config.get("n_particles"), config.get("n_steps")
    if "merge" not in config and isinstance(plan, Mapping) and isinstance(n, int) and isinstance(steps, int):
        plan = {"passes": n * steps, **plan}  # every step was one of all particles
        state = {**state, "plan": plan}
    if "memory" not in config or not isinstance(plan, Mapping):
        return {**state, "config": json.dumps(settings_of_this_version(config))}
    config = settings_of_this_version(config, plan.get("memory"))
    names = {"ways_out": "alternatives"}
    plan = {names.get(name, name): value for name, value in plan.items() if name != "memory"}
    return {**state, "config": json.dumps(config), "plan": {**plan, "update": config["update"]}}


def check_same(
    state: Mapping[str, Any],
    config: SFPKConfig,
    execution: Execution,
    fingerprint: str,
    names: list[str],
    structure: str | None = None,  # its fingerprint; None for single weights
) -> None:
    """That a state belongs to this model and this run.

    Raises:
        TypeError: no dict, or an entry of another type.
        ValueError: it does not; the message says what differs.
    """
    if not isinstance(state, Mapping):
        raise TypeError(
            f"state: wanted what SFPKPruner.state_dict() returns, got {type(state).__name__}; a file: load()"
        )
    missing = _PARTS - state.keys()
    if missing:
        raise ValueError(f"state: wanted what SFPKPruner.state_dict() returns, got one without {sorted(missing)}")
    more = sorted(str(name) for name in state.keys() - _PARTS)
    if more:
        raise ValueError(f"state: wanted what SFPKPruner.state_dict() returns, got one with {more[:5]}, which none has")
    if check.texts("state: names", state["names"]) != names:
        other = sorted(set(state["names"]) ^ set(names))
        raise ValueError(
            f"state: wanted one over the same prunable tensors (names), got one that differs in {other[:5] or 'order'}"
        )
    if check.text("state: model", state["model"]) != fingerprint:
        raise ValueError(
            f"state: wanted one of this model (fingerprint {fingerprint[:12]}), got one of another or of other weights "
            f"({state['model'][:12]})"
        )
    if state["structure"] != structure:
        raise ValueError(
            "state: structure: wanted the same channels, heads and neurons at the same costs (example_inputs, "
            f"ignored_layers), got {check.got(state['structure'])}, that of others"
        )
    try:
        saved, now = json.loads(check.text("state: config", state["config"])), json.loads(settings(config, execution))
    except json.JSONDecodeError as error:
        raise ValueError(f"state: config: wanted settings as JSON, got what is none: {error}") from error
    if not isinstance(saved, dict):
        raise ValueError(f"state: config: wanted settings by name, got {check.got(saved)}")
    different = [name for name in {**saved, **now} if name not in _FREE and saved.get(name) != now.get(name)]
    if different:
        words = ", ".join(f"{name} {saved.get(name)!r} (now {now.get(name)!r})" for name in different)
        raise ValueError(
            f"config: wanted that of the saved run, got a difference in {words}; to go on with other settings, start a "
            "run from its particles: start=result.particles"
        )


def record(name: str, value: Any, number: int, config: SFPKConfig, tensors: int) -> StepRecord:
    """The record of step ``number`` from its fields.

    Raises:
        TypeError, ValueError: it is none; the message names the field.
    """
    check.entries(name, value, [field.name for field in dataclasses.fields(StepRecord)])
    n, skips = particles_after(config, number - 1), config.nonfinite == "skip_particle"
    if check.integer(f"{name}.step", value["step"]) != number:
        raise ValueError(f"{name}.step: wanted {number}, got {value['step']}")
    skipped = check.sequence(f"{name}.skipped", value["skipped"])
    return StepRecord(
        step=number,
        scheduled_density=check.real(f"{name}.scheduled_density", value["scheduled_density"], 0.0, 1.0),
        densities=check.reals(f"{name}.densities", value["densities"], n, 0.0),
        energies=check.reals(f"{name}.energies", value["energies"], n, finite=not skips),
        cosines=check.reals(f"{name}.cosines", value["cosines"], n, finite=not skips),
        seconds=check.real(f"{name}.seconds", value["seconds"], 0.0),
        start_density=check.real(f"{name}.start_density", value["start_density"], 0.0),
        deviation=check.real(f"{name}.deviation", value["deviation"], 0.0),
        overlaps=[
            check.reals(f"{name}.overlaps[{i}]", row, n, 0.0, 1.0)
            for i, row in enumerate(check.sequence(f"{name}.overlaps", value["overlaps"], n))
        ],
        layer_densities=check.reals(f"{name}.layer_densities", value["layer_densities"], tensors, 0.0, 1.0),
        effective_dimensions=_shares(f"{name}.effective_dimensions", value["effective_dimensions"], number, config),
        agreements=_agreements(f"{name}.agreements", value["agreements"], number, config),
        skipped=[check.integer(f"{name}.skipped[{i}]", item, 0, n - 1) for i, item in enumerate(skipped)],
        alarms=check.texts(f"{name}.alarms", value["alarms"]),
    )


def _shares(name: str, value: Any, number: int, config: SFPKConfig) -> list[float]:
    """Effective dimensions, in the steps that have them."""
    looked_at = StepLength(config, []).looks_at(number - 1)
    wanted = particles_after(config, number - 1) if looked_at else 0
    shares = check.reals(name, value, wanted, 0.0, finite=False)
    if any(share == 0.0 or share > 1.0 + 1e-6 for share in shares):
        raise ValueError(f"{name}: wanted shares in (0, 1], got {shares}")
    return shares


def _agreements(name: str, value: Any, number: int, config: SFPKConfig) -> list[float]:
    """Cosines, where gradients are averaged."""
    wanted = particles_after(config, number - 1) if most(config) > 0 else 0
    found = check.reals(name, value, wanted, finite=False)
    if any(abs(cosine) > 1.0 + 1e-6 for cosine in found):
        raise ValueError(f"{name}: wanted cosines in [-1, 1], got {found}")
    return found


def history(name: str, value: Any, config: SFPKConfig, tensors: int, steps: int | None = None) -> list[StepRecord]:
    """The records of so many steps.

    Raises:
        TypeError, ValueError: they are none.
    """
    items = check.sequence(name, value, steps)
    return [record(f"{name}[{i}]", item, i + 1, config, tensors) for i, item in enumerate(items)]


def plan(name: str, value: Any, config: SFPKConfig, d: int) -> Plan:
    """The plan from its fields.

    Raises:
        TypeError, ValueError: it is none, or that of another run.
    """
    check.entries(name, value, [field.name for field in dataclasses.fields(Plan)])
    whole = {"particles": config.n_particles, "coordinates": d, "steps": config.n_steps, "passes": passes(config)}
    for field, wanted in whole.items():
        check.integer(f"{name}.{field}", value[field], wanted, wanted)
    check.text(f"{name}.update", value["update"], (config.update,))
    choice = check.entries(f"{name}.choice", value["choice"], ("mode", "reason", "seconds", "transient"))
    check.text(f"{name}.choice.mode", choice["mode"], [mode for mode in ENERGY_MODES if mode not in ("auto", "timed")])
    check.text(f"{name}.choice.reason", choice["reason"])
    seconds = check.numbers_by_name(f"{name}.choice.seconds", choice["seconds"], whole=False)
    transient = check.numbers_by_name(f"{name}.choice.transient", choice["transient"], whole=True)
    for field in ("available", "model_available"):
        if value[field] is not None:
            check.integer(f"{name}.{field}", value[field])
    return Plan.from_dict({
        **value,
        "choice": {"mode": choice["mode"], "reason": choice["reason"], "seconds": seconds, "transient": transient},
        **{
            field: check.numbers_by_name(f"{name}.{field}", value[field], whole=True)
            for field in ("parts", "model_parts", "alternatives")
        },
        "seconds_per_step": check.real(f"{name}.seconds_per_step", value["seconds_per_step"], 0.0),
    })  # fmt: skip


def energies(
    name: str, value: Any, records: Sequence[StepRecord], config: SFPKConfig, device: torch.device
) -> Tensor | None:
    """The energies of the last step, those of its record (:func:`energies_of`).

    Raises:
        TypeError, ValueError: others.
    """
    if not records:
        if value is not None:
            raise ValueError(f"{name}: wanted None before the first step, got {check.got(value)}")
        return None
    last = energies_of(records, config)
    found = check.tensor(name, value, tuple(last.shape), torch.float64, finite=False).to(device, copy=True)
    if not torch.equal(found.nan_to_num(0.0).cpu(), last.nan_to_num(0.0)) or not torch.equal(
        found.isnan().cpu(), last.isnan()
    ):
        raise ValueError(f"{name}: wanted those of the last step of history, got others")
    return found

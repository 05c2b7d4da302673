"""The file a run is resumed from: which model, which settings, and everything that decides what follows."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config import SFPKConfig
from ..coordinates.flat import Coordinates, unwrapped
from ..execution import ENERGY_MODES, Execution
from ..masks.maskset import MaskSet
from ..ops import unpack_mask
from ..utils.files import check_writable
from ..utils.tensors import as_numpy, is_sparse, parts
from . import state_checks as check
from .planning import Plan
from .records import StepRecord
from .waypoints import Waypoint

KIND = "sfpk-run-2"  # format and version

# Settings that may change between parts of a run: a new seed makes a branch; a limit decides nothing but refusal.
_FREE = ("seed", "memory_limit")

_PARTS = {
    "model", "config", "names", "step", "particles", "vote", "energies", "history", "waypoints", "alarms", "taken",
    "scale", "plan",
}  # fmt: skip


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and values of all parameters and buffers, the same inside a wrapper."""
    digest = hashlib.sha256()
    for name, value in unwrapped(model).state_dict().items():
        if not isinstance(value, torch.Tensor):
            continue
        value = value.detach().cpu()
        digest.update(json.dumps([name, list(value.shape), str(value.dtype)]).encode())
        for part in _dense_parts(value):
            digest.update(as_numpy(part.contiguous().reshape(-1).view(torch.uint8)).data)
    return digest.hexdigest()


def _dense_parts(value: torch.Tensor) -> list[torch.Tensor]:
    """What a tensor is made of: itself, or indices and values of a sparse one."""
    if value.layout == torch.strided:
        return [value]
    if value.layout == torch.sparse_coo:
        value = value.coalesce()
    return list(parts(value).values()) if is_sparse(value) else [value.to_dense()]


def settings(config: SFPKConfig, execution: Execution) -> str:
    """All settings of a run, as JSON."""
    return json.dumps({**config.to_dict(), **execution.to_dict()}, indent=2)


def settings_of_this_version(settings: Any, kept: str | None = None) -> Any:
    """Settings by name in the words of this version: what was called ``memory`` once is ``update`` now.

    Args:
        settings: those of a file; what is no dict is returned as it is.
        kept: what the run's plan says of ``memory``.
    """
    if not isinstance(settings, dict) or "memory" not in settings:
        return settings
    kept = kept or settings["memory"]
    others = {name: value for name, value in settings.items() if name != "memory"}
    return {**others, "update": "gauss_seidel" if kept == "lean" else "jacobi"}


def of_this_version(state: Any) -> Any:
    """A state in the words of this version; what is none, or is damaged, as it is: who reads it says what is wrong."""
    if not isinstance(state, Mapping) or not isinstance(state.get("config"), str):
        return state
    plan = state.get("plan")
    kept = plan.get("memory") if isinstance(plan, Mapping) else None
    try:
        config = settings_of_this_version(json.loads(state["config"]), kept)
    except json.JSONDecodeError:
        return state
    if isinstance(plan, Mapping) and "memory" in plan and isinstance(config, dict):
        plan = {**{name: value for name, value in plan.items() if name != "memory"}, "update": config.get("update")}
    return {**state, "config": json.dumps(config, indent=2), "plan": plan}


def check_same(
    state: Mapping[str, Any], config: SFPKConfig, execution: Execution, fingerprint: str, names: list[str]
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
    n, skips = config.n_particles, config.nonfinite == "skip_particle"
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
        skipped=[check.integer(f"{name}.skipped[{i}]", item, 0, n - 1) for i, item in enumerate(skipped)],
        alarms=check.texts(f"{name}.alarms", value["alarms"]),
    )


def history(name: str, value: Any, config: SFPKConfig, tensors: int, steps: int | None = None) -> list[StepRecord]:
    """The records of so many steps.

    Raises:
        TypeError, ValueError: they are none.
    """
    items = check.sequence(name, value, steps)
    return [record(f"{name}[{i}]", item, i + 1, config, tensors) for i, item in enumerate(items)]


def waypoints(
    name: str,
    value: Any,
    coordinates: Coordinates,
    schedule: Sequence[float],
    step: int,  # done
    dtypes: Sequence[torch.dtype],  # that scores may have
) -> list[Waypoint]:
    """The masks taken on the way, by rising sparsity.

    Raises:
        TypeError, ValueError: they are none.
    """
    found: list[Waypoint] = []
    for i, item in enumerate(check.sequence(name, value)):
        where = f"{name}[{i}]"
        check.entries(where, item, ("sparsity", "step", "bits", "score"))
        sparsity = check.real(f"{where}.sparsity", item["sparsity"], 0.0, 1.0)
        if found and sparsity <= found[-1].sparsity:
            raise ValueError(f"{where}.sparsity: wanted more than {found[-1].sparsity:g}, got {sparsity:g}")
        at = check.integer(f"{where}.step", item["step"], 1, step)
        if not reached(sparsity, schedule[at]) or reached(sparsity, schedule[at - 1]):
            raise ValueError(f"{where}.step: wanted that in which the schedule passes {sparsity:g}, got {at}")
        d = coordinates.d
        bits = check.tensor(f"{where}.bits", item["bits"], (-(-d // 8),), torch.uint8).cpu()
        mask = MaskSet.from_flat(unpack_mask(bits, d), coordinates)
        score = item["score"]
        if score is not None:
            score = check.tensor(f"{where}.score", score, (d,), *dtypes).to("cpu", copy=True)
        found.append(Waypoint(sparsity, at, mask, score))
    return found


def reached(sparsity: float, density: float) -> bool:
    """Whether a schedule that stands at this density has passed that sparsity."""
    return density <= 1.0 - sparsity + 1e-12


def plan(name: str, value: Any, config: SFPKConfig, d: int) -> Plan:
    """The plan from its fields.

    Raises:
        TypeError, ValueError: it is none, or that of another run.
    """
    check.entries(name, value, [field.name for field in dataclasses.fields(Plan)])
    for field, wanted in (("particles", config.n_particles), ("coordinates", d), ("steps", config.n_steps)):
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
            for field in ("parts", "model_parts", "ways_out")
        },
        "seconds_per_step": check.real(f"{name}.seconds_per_step", value["seconds_per_step"], 0.0),
    })  # fmt: skip


def energies(name: str, value: Any, records: Sequence[StepRecord], device: torch.device) -> Tensor | None:
    """The energies of the last step, those of its record.

    Raises:
        TypeError, ValueError: others.
    """
    if not records:
        if value is not None:
            raise ValueError(f"{name}: wanted None before the first step, got {check.got(value)}")
        return None
    last = torch.tensor(records[-1].energies, dtype=torch.float64, device="cpu")
    found = check.tensor(name, value, tuple(last.shape), torch.float64, finite=False).to(device, copy=True)
    if not torch.equal(found.nan_to_num(0.0).cpu(), last.nan_to_num(0.0)) or not torch.equal(
        found.isnan().cpu(), last.isnan()
    ):
        raise ValueError(f"{name}: wanted those of the last step of history, got others")
    return found


def scale(name: str, value: Any, active: bool) -> tuple[float, int]:
    """The factor on fp16 losses, and passes since it changed.

    Raises:
        TypeError, ValueError: they are none.
    """
    pair = check.sequence(name, value, 2)
    factor, calm = check.real(f"{name}[0]", pair[0], 1.0), check.integer(f"{name}[1]", pair[1])
    if not active and (factor, calm) != (1.0, 0):
        raise ValueError(f"{name}: wanted (1.0, 0) where no loss is scaled, got ({factor:g}, {calm})")
    if math.frexp(factor)[0] != 0.5:
        raise ValueError(f"{name}[0]: wanted a power of two, got {factor!r}")
    return factor, calm


def save_path(
    every: int | None,
    path: str | os.PathLike[str] | None,
    resume: str | os.PathLike[str] | bool | None,
) -> str | os.PathLike[str] | None:
    """Where a run is saved: the arguments of :meth:`~sfpk_kernels.SFPKPruner.run`, checked.

    Raises:
        TypeError, ValueError: a bad ``every``, nothing to write to, or a file that would never be written.
        OSError: the file cannot be written there.
    """
    if every is not None and (isinstance(every, bool) or not isinstance(every, int)):
        raise TypeError(f"save_every: wanted a number of steps or None, got {every!r}")
    if every is not None and every < 1:
        raise ValueError(f"save_every: wanted ≥ 1, got {every}")
    if path is None and not isinstance(resume, bool):
        path = resume
    if path is None and (every is not None or resume is True):
        raise ValueError("save_path: wanted a file to write, got None")
    if path is not None and every is None and not resume:
        raise ValueError(f"save_every: wanted a number of steps beside save_path={os.fspath(path)!r}, got None")
    if path is not None and every is not None:
        check_writable(path, "save_path")
    return path

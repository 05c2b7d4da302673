"""The stages of the transition as registered ops ``sfpk::transition_…``; their public functions are in stages.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..._dispatch import Backend, choose
from .. import _checks as check
from .. import _named
from .. import _transforms as transforms
from . import _arguments as arguments
from . import cpp, reference_stages, triton_backend, triton_stages
from .spec import Columns, Shard, Step, TransitionSpec, TransitionStats, part_of

_COLUMNS, _SPEC, _SHARD = (_named.schema_of(part) for part in (Columns, TransitionSpec, Shard))
_MOVED = f"Tensor grads, {_COLUMNS}, Tensor(b!)? residual, Tensor[] state, {_SPEC}, {_SHARD}"
_READ = _MOVED.replace("(b!)", "")
_SCHEMAS = {
    "measure": f"(Tensor masks, {_COLUMNS}, Tensor? residual, {_SPEC}, str backend) -> Tensor",
    "sample": f"(Tensor masks, {_READ}, str backend) -> Tensor",
    "sums": f"(Tensor masks, {_READ}, Tensor sample, str backend) -> Tensor",
    "plan": f"(Tensor[] state, Tensor sample, Tensor sums, {_SPEC}, {_SHARD}, str backend) -> (Tensor, Tensor)",
    "apply_": f"(Tensor(a!) masks, {_MOVED}, Tensor coefficients, str backend) -> Tensor",
    "stats": f"(Tensor sums, {_SPEC}, {_SHARD}, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
}


def _backends(stage: str) -> dict[str, Backend]:
    found = {"cpp": Backend(getattr(cpp, stage), cpp.why_not), "reference": Backend(getattr(reference_stages, stage))}
    if stage in ("plan", "stats"):
        return {**found, "cpp": Backend(getattr(cpp, stage), cpp.no_extension)}
    return {**found, "triton": Backend(getattr(triton_stages, stage), triton_backend.why_not)}


BACKENDS = {stage: _backends(stage) for stage in _SCHEMAS}
_columns_of, _spec_of, _shard_of = (part_of(part) for part in (Columns, TransitionSpec, Shard))


def _step_of(given: Any) -> tuple[Step, Shard]:
    state = TransitionStats(*given.state)
    step = Step(given.masks, given.grads, _spec_of(given), _columns_of(given), given.residual, state)
    return step, _shard_of(given)


def _run(stage: str, given: Any, tensor: Tensor) -> Callable[..., Any]:
    return choose(f"transition_{stage}", given.backend, BACKENDS[stage], tensor)


def _measure(given: Any) -> Tensor:
    columns, spec = _columns_of(given), _spec_of(given)
    arguments.check_values("transition_measure", columns, spec)
    result: Tensor = _run("measure", given, given.masks)(given.masks, columns, given.residual, spec)
    return result


def _sample(given: Any) -> Tensor:
    result: Tensor = _run("sample", given, given.masks)(*_step_of(given))
    return result


def _sums(given: Any) -> Tensor:
    arguments.check_values("transition_sums", _columns_of(given), _spec_of(given))
    result: Tensor = _run("sums", given, given.masks)(*_step_of(given), given.sample)
    return result


def _plan(given: Any) -> tuple[Tensor, Tensor]:
    state, spec = TransitionStats(*given.state), _spec_of(given)
    coefficients, cosines = _run("plan", given, given.sums)(state, given.sample, given.sums, spec, _shard_of(given))
    if spec.nonfinite == "raise":
        arguments.check_finite(cosines)
    return coefficients, cosines


def _apply_(given: Any) -> Tensor:
    masks, residual = given.masks, given.residual
    arguments.check_memory("transition_apply_", masks, given.grads, residual)
    with check.writing(masks, residual):
        sums: Tensor = _run("apply_", given, masks)(*_step_of(given), given.coefficients)
    check.was_written(masks, *([] if residual is None else [residual]))
    return sums.clone() if sums.is_inference() and not torch.is_inference_mode_enabled() else sums


def _stats(given: Any) -> tuple[Tensor, ...]:
    return tuple(_run("stats", given, given.sums)(given.sums, _spec_of(given), _shard_of(given)))


def _new_sums(rows: Callable[[Any, Any], Any]) -> Callable[[Any], Tensor]:
    """Sums (rows(n, spec), n) of n particles, to be filled."""

    def fake(given: Any) -> Tensor:
        n = given.masks.shape[0]
        return given.masks.new_empty((rows(n, _spec_of(given)), n), dtype=torch.float64)

    return fake


def _plan_fake(given: Any) -> tuple[Tensor, Tensor]:
    n = given.sums.shape[1]
    return given.sums.new_empty((6, n)), given.sums.new_empty(n)


def _stats_fake(given: Any) -> tuple[Tensor, ...]:
    return arguments.new_statistics(given.sums, given.sums.shape[1])


_of_particles = _new_sums(lambda n, spec: 4 + n)
IMPLEMENTATIONS = {  # of each stage, and what stands in for it on fake tensors
    "measure": (_measure, _of_particles),
    "sample": (_sample, _new_sums(lambda n, spec: 2)),
    "sums": (_sums, _new_sums(lambda n, spec: 8 + 6 * n if spec.retracts_after_pull(n) else 8)),
    "plan": (_plan, _plan_fake),
    "apply_": (_apply_, _of_particles),
    "stats": (_stats, _stats_fake),
}
for _stage, _schema in _SCHEMAS.items():
    _name = f"sfpk::transition_{_stage}"
    torch.library.define(_name, _schema)
    _named.register(_name, *IMPLEMENTATIONS[_stage])
    _names = _named.argument_names(_name)
    _mutated = {_names.index(name): name for name in ("masks", "residual") if _stage == "apply_"}
    transforms.register_vmap(_name, getattr(torch.ops.sfpk, f"transition_{_stage}"), mutated=_mutated)

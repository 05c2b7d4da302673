"""The state of a run: which model, which settings, and what each part says decides the rest."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from . import checkpoint
from . import state_checks as check
from .merging import passes, steps_of_all
from .particles import SystemState
from .run import Run


def state_of(run: Run, copy: bool) -> dict[str, Any]:
    """Tensors (copies, where asked for) and plain values."""
    energies = run.energies
    return {
        "model": run.fingerprint,
        "structure": run.structure,
        "config": checkpoint.settings(run.config, run.execution),
        "names": [tensor.name for tensor in run.coordinates.tensors],
        "step": run.system.step,
        "particles": run.system.state_dict(copy=copy),
        "vote": run.vote.state_dict(copy=copy),
        "energies": None if energies is None else energies.clone(),
        "history": [dataclasses.asdict(record) for record in run.history],
        "waypoints": run.waypoints.state_dict(run.coordinates),
        "alarms": run.alarms.state_dict(),
        "taken": run.taken,
        "scale": run.energy.scale.state_dict(),
        "plan": None if run.plan is None else dataclasses.asdict(run.plan_in_use()),
    }


def checked(run: Run, state: Any) -> Callable[[], None]:
    """Look at every entry of a state; what is returned has the run go on from it, and looks at nothing more.

    Raises:
        TypeError: no dict, or an entry of another type.
        ValueError: a state of another model, of other settings, or not of a run; the message names the entry.
    """
    config, tensors, device = run.config, run.coordinates.tensors, run.theta.device
    state = checkpoint.of_this_version(state)
    names = [tensor.name for tensor in tensors]
    checkpoint.check_same(state, config, run.execution, run.fingerprint, names, run.structure)
    particles = check.entries("state: particles", state["particles"], SystemState._fields)
    if config.settle and not check.same(particles["schedule"], run.system.schedule):
        raise ValueError(
            "waypoints, start: wanted those of the saved run, which settles, got others (particles.schedule)"
        )
    system = run.system.checked(particles, "state: particles.")
    if check.integer("state: step", state["step"]) != system.step:
        raise ValueError(f"state: step: wanted {system.step}, that of particles, got {state['step']}")
    history = checkpoint.history("state: history", state["history"], config, len(tensors), system.step)
    energies = checkpoint.energies("state: energies", state["energies"], history, config, device)
    dtypes = torch.promote_types(system.masks.dtype, torch.float32), torch.float64
    vote = run.vote.checked("state: vote", state["vote"], run.theta, system.step, dtypes)
    waypoints = run.waypoints.checked(
        "state: waypoints", state["waypoints"], run.coordinates, system.schedule, system.step, dtypes
    )
    alarms = run.alarms.checked("state: alarms", state["alarms"])
    taken = check.integer("state: taken", state["taken"], 0, passes(config, system.step))
    # By n in the steps of all, by one in those after them: some of either kind may have used other batches.
    n, alone = config.n_particles, max(0, system.step - steps_of_all(config))
    if taken - n * min(taken // n, system.step - alone) > alone:
        after = f", and up to {alone} of the one after them" if alone else ""
        raise ValueError(f"state: taken: wanted a multiple of {n} batches, one per particle{after}, got {taken}")
    scale = run.energy.scale.checked("state: scale", state["scale"])
    plan = None
    if state["plan"] is not None or system.step:
        plan = checkpoint.plan("state: plan", state["plan"], config, run.coordinates.d)

    def take_over() -> None:
        run.system.take_over(system)
        run.vote.take_over(vote)
        run.waypoints.take_over(waypoints)
        run.alarms.take_over(alarms)
        run.energy.put_back((run.energy.choice if plan is None else plan.choice, scale))
        run.take_over(history, energies, taken, plan)

    return take_over

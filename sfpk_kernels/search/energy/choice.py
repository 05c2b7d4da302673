"""Which way of computing energies is fastest for a model: a short trial, not a guess."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ...utils.memory import in_words, peak_bytes
from ._problem import CannotRunError, Problem
from ._scale import LossScale
from .batched import Batched, stack
from .graphed import Graphed
from .sequential import OneByOne

_MARGIN = 0.9  # another way must take less than this share of the time of one by one
_TRIALS = 3
_PATIENCE = 1.0  # seconds of trials after which one is enough
_LONG = 2.0  # seconds of one pass: what other ways save, launching, is nothing then


@dataclass(frozen=True)
class Choice:
    """A way of computing energies, and what the trial found."""

    mode: str  # "vmap", "sequential" or "cudagraph"
    reason: str
    seconds: dict[str, float] = field(default_factory=dict)  # per particle, of the ways tried
    transient: dict[str, int] = field(default_factory=dict)  # peak bytes of one pass (vmap: of a chunk)


def choose(
    problem: Problem,
    mode: str,
    batch: Any,
    chunk: int,
    room: int | None,
) -> Choice:
    """Try ``batch`` at the dense weights, only as much as the question needs; the model must be guarded.

    Args:
        problem: model, loss and the rest.
        mode: ``"auto"``, or the one that is wanted and only measured.
        batch: of one particle.
        chunk: particles in one vmap pass.
        room: bytes that the trial of a batched pass may take.
    """
    single = _time_one_by_one(OneByOne(problem, LossScale(problem.precision == "fp16")), batch)
    seconds, transient = {"sequential": single[0]}, {"sequential": single[1]}
    if mode == "sequential":
        return Choice(mode, "as asked for", seconds, transient)
    if mode == "auto" and torch.are_deterministic_algorithms_enabled():
        return Choice(
            "sequential", "no timed choice under torch.use_deterministic_algorithms(True)", seconds, transient
        )
    why_not: dict[str, str] = {}
    for name in ("vmap", "cudagraph"):
        if mode not in ("auto", name):
            continue
        try:
            if name == "vmap":
                seconds[name], transient[name] = _time_batched(problem, batch, chunk, single, room, mode == "auto")
            elif mode == name or (problem.device.type == "cuda" and not problem.compiled):
                seconds[name], transient[name] = _time_one_by_one(Graphed(problem, LossScale(False)), batch)
        except CannotRunError as error:
            if mode == name:
                raise RuntimeError(f"energy_mode={name!r} cannot run this model: {error}") from error
            why_not[name] = str(error)
        except Exception as error:  # whatever it is, one by one the model runs
            if mode == name:
                raise
            why_not[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    if mode != "auto":
        return Choice(mode, "as asked for", seconds, transient)
    best = min(seconds, key=lambda name: seconds[name] * (_MARGIN if name == "sequential" else 1.0))
    times = ", ".join(f"{name} {1e3 * value:.3g} ms" for name, value in seconds.items())
    reasons = "".join(f"; not {name}: {reason}" for name, reason in why_not.items())
    return Choice(best, f"per particle {times}{reasons}", seconds, transient)


def _time_one_by_one(runner: OneByOne, batch: Any) -> tuple[float, int]:
    """Seconds of a pass, and its peak bytes beyond weights and gradient row."""
    row = torch.empty_like(runner.problem.theta, device=runner.problem.device)
    with runner.ready():
        runner.load_dense()
        transient = peak_bytes(lambda: runner.differentiate(batch, row), runner.problem.device)
        return _fastest(lambda: runner.differentiate(batch, row), runner.problem), transient


def _time_batched(
    problem: Problem, batch: Any, chunk: int, single: tuple[float, int], room: int | None, may_skip: bool
) -> tuple[float, int]:
    """Seconds per particle of a batched pass, and its peak bytes beyond the gradients."""
    runner = Batched(problem, LossScale(problem.precision == "fp16"))
    needed = chunk * (single[1] + 3 * 4 * problem.theta.numel())
    if may_skip and single[0] > _LONG:
        raise CannotRunError(f"a pass of one particle takes {single[0]:.1f} s, launching is no part of it")
    if may_skip and room is not None and needed > room:
        raise CannotRunError(f"a pass of {chunk} particles takes about {in_words(needed)}, {in_words(room)} are free")
    stacked = stack([batch] * chunk)
    if stacked is None:
        raise CannotRunError("the batch holds something else than tensors")
    weights = problem.theta.expand(chunk, -1)
    losses = problem.theta.new_empty(chunk, dtype=torch.float64)
    grads = problem.theta.new_empty(chunk, problem.theta.numel())

    def once() -> None:
        with torch.enable_grad():
            runner.differentiate(weights.contiguous(), stacked, losses, grads)

    transient = peak_bytes(once, problem.device)
    return _fastest(once, problem) / chunk, transient


def _fastest(once: Callable[[], Any], problem: Problem) -> float:
    """Seconds of the fastest of a few calls."""
    times: list[float] = []
    if problem.compiled or problem.device.type == "cuda":
        once()  # compiles, chooses algorithms
    while not times or (len(times) < _TRIALS and sum(times) < _PATIENCE):
        if problem.device.type == "cuda":
            torch.cuda.synchronize(problem.device)
        started = time.perf_counter()
        once()
        if problem.device.type == "cuda":
            torch.cuda.synchronize(problem.device)
        times.append(time.perf_counter() - started)
    return min(times)

"""Which way of computing energies a run takes: as named, by a written rule, or the fastest in a short trial."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...utils.memory import format_bytes, peak_bytes
from ._problem import CannotRunError, Problem
from ._scale import LossScale
from .batched import Batched, stack
from .graphed import Graphed
from .sequential import OneByOne

UNDECIDED = ("auto", "timed")
VMAP_WEIGHTS = 1 << 20  # up to which "auto" runs particles at once

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


def by_rule(problem: Problem, together: bool) -> tuple[str, str]:
    """The way that ``"auto"`` takes, and why: by kinds of layers and sizes alone, so that runs repeat.

    At once where launching is a large part of a pass and batching costs nothing: matrix products of small models.
    Convolutions become grouped ones under vmap and attention's backward loops: 1.3 to 2.1 x slower than one by one.
    """
    if not together:
        return "sequential", "one gradient is kept"
    if problem.compiled:
        return "sequential", "the loss is compiled"
    weights = 0
    for module in problem.model.modules():
        own = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        weights += own
        if isinstance(module, nn.MultiheadAttention) or (own and not isinstance(module, nn.Linear)):
            return "sequential", f"a model with {type(module).__name__}"
    if weights > VMAP_WEIGHTS:
        return "sequential", f"a model of {weights:,} weights, more than {VMAP_WEIGHTS:,}"
    return "vmap", f"linear layers alone, of {weights:,} weights"


def choose(
    problem: Problem,
    mode: str,
    batch: Any,
    chunk: int,
    together: bool,
    trial_bytes: int | None,
) -> Choice:
    """Try ``batch`` at the dense weights, only as much as the question needs; the model must be guarded.

    Args:
        problem: model, loss and the rest.
        mode: ``"auto"``, ``"timed"``, or the one that is wanted and only measured.
        batch: of one particle.
        chunk: particles in one vmap pass.
        together: whether vmap is allowed.
        trial_bytes: bytes that the trial of a batched pass may take with ``"timed"``.
    """
    single = time_one_by_one(OneByOne(problem, LossScale(problem.precision == "fp16")), batch)
    seconds, transient = {"sequential": single[0]}, {"sequential": single[1]}
    timed, reason, why_not = mode == "timed", "as asked for", ""
    wanted = [mode]
    if mode == "auto":
        named, reason = by_rule(problem, together)
        wanted = [named]
    elif timed and torch.are_deterministic_algorithms_enabled():
        reason, wanted = "no timed choice under torch.use_deterministic_algorithms(True)", []
    elif timed:
        graphs = problem.device.type == "cuda" and not problem.compiled
        wanted = [*(["vmap"] if together else []), *(["cudagraph"] if graphs else [])]
    for name in wanted:
        try:
            if name == "vmap":
                seconds[name], transient[name] = _time_batched(problem, batch, chunk, single, trial_bytes, timed)
            elif name == "cudagraph":
                seconds[name], transient[name] = time_one_by_one(Graphed(problem, LossScale(False)), batch)
        except CannotRunError as error:
            if mode not in UNDECIDED:
                raise RuntimeError(f"energy_mode={name!r} cannot run this model: {error}") from error
            why_not += f"; not {name}: {error}"
        except Exception as error:  # whatever it is, one by one the model runs
            # What is free just now must not decide how a run is computed that repeats: only a timed trial may ask.
            full = isinstance(error, MemoryError | torch.OutOfMemoryError)
            if full and mode == "auto" and hasattr(error, "add_note"):  # Python ≥ 3.11
                error.add_note("sfpk_kernels: Execution(energy_mode='sequential') takes less memory")
            if mode not in UNDECIDED or (full and not timed):
                raise
            why_not += f"; not {name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    if timed and wanted:
        best = min(seconds, key=lambda name: seconds[name] * (_MARGIN if name == "sequential" else 1.0))
        reason = "per particle " + ", ".join(f"{name} {1e3 * value:.3g} ms" for name, value in seconds.items())
    else:
        best = next((name for name in wanted if name in seconds), "sequential")
    return Choice(best, reason + why_not, seconds, transient)


def time_one_by_one(runner: OneByOne, batch: Any) -> tuple[float, int]:
    """Seconds of a pass, and its peak bytes beyond weights and gradient row."""
    row = torch.empty_like(runner.problem.theta, device=runner.problem.device)
    with runner.ready():
        runner.load_dense()
        transient = peak_bytes(lambda: runner.differentiate(batch, row), runner.problem.device)
        return _fastest(lambda: runner.differentiate(batch, row), runner.problem), transient


def _time_batched(
    problem: Problem, batch: Any, chunk: int, single: tuple[float, int], trial_bytes: int | None, may_skip: bool
) -> tuple[float, int]:
    """Seconds per particle of a batched pass, and its peak bytes beyond the gradients."""
    runner = Batched(problem, LossScale(problem.precision == "fp16"))
    needed = chunk * (single[1] + 3 * 4 * problem.theta.numel())
    if may_skip and single[0] > _LONG:
        raise CannotRunError(f"a pass of one particle takes {single[0]:.1f} s, launching is no part of it")
    if may_skip and trial_bytes is not None and needed > trial_bytes:
        raise CannotRunError(
            f"a pass of {chunk} particles takes about {format_bytes(needed)}, {format_bytes(trial_bytes)} are free"
        )
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

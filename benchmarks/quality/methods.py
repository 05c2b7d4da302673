"""The methods of the study: from a problem, a sparsity and a number of passes to a mask.

A pass is one forward and backward pass over one mini-batch. Each method is given as many as the cell says, and uses
them as its authors do; those that need fewer (magnitude: none) are measured once for all.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

from sfpk_kernels import Execution, MaskSet, SFPKConfig, baselines, prune

from .task import Problem

Method = Callable[[Problem, float, int, int], MaskSet]  # problem, sparsity, passes, seed


def sfpk(preset: str = "default", particles: int = 10, **fields: Any) -> Method:
    """The search: ``passes`` shared by the particles."""

    def search(problem: Problem, sparsity: float, passes: int, seed: int) -> MaskSet:
        n = min(particles, max(1, passes // 10))
        config = SFPKConfig.preset(
            preset, sparsity=sparsity, n_particles=n, n_steps=max(1, passes // n), seed=seed, **fields
        )
        return prune(
            problem.model,
            problem.batches(seed),
            loss_fn=problem.loss_fn,
            config=config,
            execution=Execution(),
            progress=False,
            **problem.options,
        ).mask

    return search


def _magnitude(problem: Problem, sparsity: float, passes: int, seed: int) -> MaskSet:
    return baselines.magnitude(problem.model, sparsity, **problem.options)


def _snip(problem: Problem, sparsity: float, passes: int, seed: int) -> MaskSet:
    batches = list(islice(problem.batches(seed), passes))
    return baselines.snip(problem.model, batches, sparsity, loss_fn=problem.loss_fn, **problem.options)


METHODS: dict[str, Method] = {
    "sfpk": sfpk(),
    "sfpk, one particle": sfpk(particles=1),
    "sfpk, paper": sfpk("paper"),
    "sfpk, authors": sfpk("authors"),
    "magnitude": _magnitude,
    "snip": _snip,
}
WITHOUT_PASSES = {"magnitude"}  # measured once, whatever the passes

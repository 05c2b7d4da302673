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


def magnitude(allocation: str) -> Method:
    """No data; |θ| over all tensors together, or shared out first."""

    def search(problem: Problem, sparsity: float, passes: int, seed: int) -> MaskSet:
        return baselines.magnitude(problem.model, sparsity, allocation=allocation, **problem.options)

    return search


def scored(score: Callable[..., MaskSet]) -> Method:
    """A score from as many batches as there are passes."""

    def search(problem: Problem, sparsity: float, passes: int, seed: int) -> MaskSet:
        batches = list(islice(problem.batches(seed), passes))
        return score(problem.model, batches, sparsity, loss_fn=problem.loss_fn, **problem.options)

    return search


def learned(optimizer: str) -> Method:
    """A straight-through mask, learned for as many passes."""

    def search(problem: Problem, sparsity: float, passes: int, seed: int) -> MaskSet:
        return baselines.ste(
            problem.model, problem.batches(seed), sparsity, loss_fn=problem.loss_fn, optimizer=optimizer,
            passes=passes, seed=seed, **problem.options,
        )  # fmt: skip

    return search


def _force(problem: Problem, sparsity: float, passes: int, seed: int) -> MaskSet:
    """A batch a round."""
    return baselines.force(
        problem.model, problem.batches(seed), sparsity, loss_fn=problem.loss_fn, rounds=passes, seed=seed,
        **problem.options,
    )  # fmt: skip


METHODS: dict[str, Method] = {
    "sfpk": sfpk(),
    "sfpk, one particle": sfpk(particles=1),
    "sfpk, paper": sfpk("paper"),
    "sfpk, authors": sfpk("authors"),
    "straight-through, SGD": learned("sgd"),
    "straight-through, Adam": learned("adam"),
    "force": _force,
    "woodfisher": scored(baselines.woodfisher),
    "snip": scored(baselines.snip),
    "magnitude": magnitude("global"),
    "magnitude, LAMP": magnitude("lamp"),
}
WITHOUT_PASSES = {"magnitude", "magnitude, LAMP"}  # measured once, whatever the passes

"""The methods of the study: from a problem, a sparsity and a number of passes to a mask.

A pass is one forward and backward pass over one mini-batch. Each method is given as many as the cell says, and uses
them as its authors do; those that need none (magnitude) are measured once for all. ``baselines.single_particle`` is
"sfpk, one particle".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

from sfpk_kernels import Execution, MaskSet, SFPKConfig, baselines, prune

from .task import Problem, Task

Search = Callable[[Problem, float, int, int], MaskSet]  # problem, sparsity, passes, seed
MakeConfig = Callable[[float, int, int], SFPKConfig]  # sparsity, passes, seed

GRASP_PASSES = 3  # of a batch: for the gradient, for the gradient again, backward through it


@dataclass(frozen=True)
class Method:
    """A way to a mask, and where there is one."""

    search: Search
    free: bool = False  # needs no passes: measured once, whatever their number
    linear: bool = False  # only on tasks of Linear layers
    sloped: bool = False  # only where the loss of the dense network has a gradient
    conserved: bool = False  # only where flow is conserved from layer to layer: not in transformers
    config: MakeConfig | None = None  # of a search that goes on from shot to shot
    repeats: bool = False  # may be done again on weights trained under its mask, as its authors or others do
    ablation: bool = False  # measured only if named

    def exists(self, task: Task) -> bool:
        """Whether it is defined on the task."""
        return not (
            (self.linear and not task.linear)
            or (self.sloped and not task.sloped)
            or (self.conserved and task.transformer)
        )


def sfpk(preset: str = "default", particles: int = 10, ablation: bool = False, **fields: Any) -> Method:
    """The search with these fields of its config: ``passes`` shared by the particles."""

    def make(sparsity: float, passes: int, seed: int) -> SFPKConfig:
        n = min(particles, max(1, passes // 10))
        steps = max(1, passes // n)
        return SFPKConfig.preset(preset, sparsity=sparsity, n_particles=n, n_steps=steps, seed=seed, **fields)

    def search(problem: Problem, sparsity: float, passes: int, seed: int) -> MaskSet:
        return prune(
            problem.model,
            problem.batches(seed),
            loss_fn=problem.loss_fn,
            config=make(sparsity, passes, seed),
            execution=Execution(),
            progress=False,
            **problem.options,
        ).mask

    return Method(search, config=make, ablation=ablation)


# One particle on a signed score, its moves an angle that falls linearly, the target density reached at 0.7 of the run.
_RECIPE: dict[str, Any] = {"particles": 1, "signed_score": True, "step_length": "angle", "hold": 0.7}


def recipe(**fields: Any) -> Method:
    """Recipe R; with other fields an ablation of it."""
    return sfpk(**{**_RECIPE, **fields}, ablation=bool(fields))


def magnitude(allocation: str) -> Method:
    """No data; |θ| over all tensors together, or shared out first."""

    def search(problem: Problem, sparsity: float, passes: int, seed: int) -> MaskSet:
        return baselines.magnitude(problem.model, sparsity, allocation=allocation, **problem.options)

    return Method(search, free=True, repeats=True)


def scored(score: Callable[..., MaskSet], per_batch: int = 1, **where: Any) -> Method:
    """A score from as many batches as there are passes, or one for ``per_batch`` of them."""

    def search(problem: Problem, sparsity: float, passes: int, seed: int) -> MaskSet:
        batches = list(islice(problem.batches(seed), max(1, passes // per_batch)))
        return score(problem.model, batches, sparsity, loss_fn=problem.loss_fn, **problem.options)

    return Method(search, **where)


def learned(optimizer: str) -> Method:
    """A straight-through mask, learned for as many passes."""

    def search(problem: Problem, sparsity: float, passes: int, seed: int) -> MaskSet:
        return baselines.ste(
            problem.model, problem.batches(seed), sparsity, loss_fn=problem.loss_fn, optimizer=optimizer,
            passes=passes, seed=seed, **problem.options,
        )  # fmt: skip

    return Method(search)


def _force(problem: Problem, sparsity: float, passes: int, seed: int) -> MaskSet:
    """A batch a round."""
    return baselines.force(
        problem.model, problem.batches(seed), sparsity, loss_fn=problem.loss_fn, rounds=passes, seed=seed,
        **problem.options,
    )  # fmt: skip


def _synflow(problem: Problem, sparsity: float, passes: int, seed: int) -> MaskSet:
    """100 rounds, as published; of the batch only the shape counts, where it holds floats."""
    return baselines.synflow(problem.model, sparsity, example=next(problem.batches(seed)), **problem.options)


def _random(problem: Problem, sparsity: float, passes: int, seed: int) -> MaskSet:
    return baselines.random(problem.model, sparsity, seed=seed, **problem.options)


METHODS: dict[str, Method] = {
    "sfpk, R": recipe(),
    "sfpk": sfpk(),
    "sfpk, one particle": sfpk(particles=1),
    "sfpk, paper": sfpk("paper"),
    "sfpk, authors": sfpk("authors"),
    "straight-through, SGD": learned("sgd"),
    "straight-through, Adam": learned("adam"),
    "force": Method(_force, sloped=True),
    "woodfisher": scored(baselines.woodfisher, sloped=True),
    # Forward passes alone, a third of a pass, but again for every block of layers.
    "sparsegpt": scored(baselines.sparsegpt, linear=True),
    "wanda": scored(baselines.wanda, linear=True),
    "snip": scored(baselines.snip, sloped=True),
    "grasp": scored(baselines.grasp, GRASP_PASSES, sloped=True),
    "synflow": Method(_synflow, free=True, conserved=True),
    "magnitude": magnitude("global"),
    "magnitude, LAMP": magnitude("lamp"),
    "random": Method(_random, free=True),
    "sfpk, R, |score|": recipe(signed_score=False),
    "sfpk, R, no hold": recipe(hold=1.0),
    "sfpk, R, radius": recipe(step_length="radius", hold=1.0),
}
STUDIED = [name for name, method in METHODS.items() if not method.ablation]

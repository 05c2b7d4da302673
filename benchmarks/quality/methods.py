"""The methods of the study: from a problem, a sparsity and a number of passes to a mask.

A pass is one forward and backward pass over one mini-batch. Each method is given as many as the cell says, and uses
them as its authors do; those that need none (magnitude) are measured once for all. ``baselines.single_particle`` is
"sfpk, one by the radius".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

from sfpk_kernels import Execution, MaskSet, SFPKConfig, baselines, prune
from sfpk_kernels.search.merging import with_passes

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


def sfpk(preset: str = "default", particles: int = 1, ablation: bool = False, **fields: Any) -> Method:
    """The search with these fields of its config, in as many steps as the passes allow, ten for each particle."""

    def make(sparsity: float, passes: int, seed: int) -> SFPKConfig:
        n = min(particles, max(1, passes // 10))
        config = SFPKConfig.preset(preset, sparsity=sparsity, n_particles=n, seed=seed, **fields)
        return with_passes(config, max(n, passes))

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


def without(**fields: Any) -> Method:
    """The default with one part of it changed."""
    return sfpk(ablation=True, **fields)


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
    "sfpk": sfpk(),
    "sfpk, population": sfpk("population", particles=10),
    "sfpk, one by the radius": sfpk("population"),
    "sfpk, paper": sfpk("paper", particles=10),
    "sfpk, authors": sfpk("authors", particles=10),
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
    "sfpk, fixed angle": without(step_length="angle"),
    "sfpk, by the radius": without(step_length="radius", hold=1.0),
    "sfpk, half the angle": without(step_scale=0.5),
    "sfpk, twice the angle": without(step_scale=2.0),
    "sfpk, no averaging": without(averaging=0.0),  # as the default below 200 passes
    "sfpk, score without sign": without(signed_score=False),
    "sfpk, no hold": without(hold=1.0),
    "sfpk, no retraction": without(retract=False),
    "sfpk, score m": without(polarizer="mask"),
    "sfpk, score not normalized": without(polarizer="mask_weight"),
    "sfpk, exponential schedule": without(schedule="exponential"),
    "sfpk, running statistics": without(bn="running"),
    "sfpk, two merged": without(particles=2, merge=0.2),
    "sfpk, four merged": without(particles=4, merge=0.2),
    "sfpk, four": without(particles=4),
    "sfpk, four without repulsion": without(particles=4, repulsion=0.0),
}
STUDIED = [name for name, method in METHODS.items() if not method.ablation]

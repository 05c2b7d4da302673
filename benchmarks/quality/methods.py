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

import torch
from torch import Tensor

from sfpk_kernels import Coordinates, Execution, MaskSet, SFPKConfig, baselines, prune
from sfpk_kernels.search.merging import with_passes

from .task import Problem, Task

Search = Callable[[Problem, float, int, int], MaskSet]  # problem, sparsity, passes, seed
MakeConfig = Callable[[float, int, int], SFPKConfig]  # sparsity, passes, seed

DEFAULT, POPULATION = "sfpk", "sfpk, population"  # what ablations change
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
    changes: str | None = None  # the method of which it is an ablation: measured only if named

    def exists(self, task: Task) -> bool:
        """Whether it is defined on the task."""
        return not (
            (self.linear and not task.linear)
            or (self.sloped and not task.sloped)
            or (self.conserved and task.transformer)
        )


Start = Callable[[SFPKConfig, int], Tensor]  # (n, d) particles, of a config and d


def sfpk(
    preset: str = "default",
    particles: int = 1,
    changes: str | None = None,
    start: Start | None = None,
    **fields: Any,
) -> Method:
    """The search with these fields of its config, in as many steps as the passes allow, ten for each particle."""

    def make(sparsity: float, passes: int, seed: int) -> SFPKConfig:
        n = min(particles, max(1, passes // 10))
        config = SFPKConfig.preset(preset, sparsity=sparsity, n_particles=n, seed=seed, **fields)
        return with_passes(config, max(n, passes))

    def search(problem: Problem, sparsity: float, passes: int, seed: int) -> MaskSet:
        config, more = make(sparsity, passes, seed), problem.options
        if start is not None:
            more = {**more, "start": start(config, Coordinates(problem.model, **problem.options).d)}
        return prune(
            problem.model,
            problem.batches(seed),
            loss_fn=problem.loss_fn,
            config=config,
            execution=Execution(),
            progress=False,
            **more,
        ).mask

    return Method(search, config=make, changes=changes)


def without(**fields: Any) -> Method:
    """The default with one part of it changed."""
    return sfpk(changes=DEFAULT, **fields)


def population(particles: int = 10, **fields: Any) -> Method:
    """The preset of several particles with one part of it changed."""
    return sfpk("population", particles, changes=POPULATION, **fields)


def perturbed(config: SFPKConfig, d: int) -> Tensor:
    """Particles around "all weights kept", a standard deviation of 0.3, of the soft density of a run's beginning."""
    noise = torch.randn(config.n_particles, d, generator=torch.Generator().manual_seed(config.seed))
    start = 1.0 + 0.3 * noise
    return start / start.square().mean(dim=1, keepdim=True).sqrt()


def shuffled_layers(problem: Problem, sparsity: float, passes: int, seed: int) -> MaskSet:
    """As many weights of each layer as the default keeps there, but any of them: what is the choice within worth?"""
    mask = METHODS[DEFAULT].search(problem, sparsity, passes, seed)
    generator = torch.Generator().manual_seed(seed)
    return MaskSet({
        name: mask[name].flatten()[torch.randperm(mask[name].numel(), generator=generator)].view(mask[name].shape)
        for name in mask
    })  # fmt: skip


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
    DEFAULT: sfpk(),
    POPULATION: sfpk("population", particles=10),
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
    "sfpk, no averaging": without(averaging=0.0),
    "sfpk, score without sign": without(signed_score=False),
    "sfpk, no hold": without(hold=1.0),
    "sfpk, no retraction": without(retract=False),
    "sfpk, score m": without(polarizer="mask"),
    "sfpk, score not normalized": without(polarizer="mask_weight"),
    "sfpk, exponential schedule": without(schedule="exponential"),
    "sfpk, running statistics": without(bn="running"),
    "sfpk, shuffled in its layers": Method(shuffled_layers, changes=DEFAULT),
    "sfpk, two merged": without(particles=2, merge=0.2),
    "sfpk, four merged": without(particles=4, merge=0.2),
    "sfpk, four": without(particles=4),
    "sfpk, four without repulsion": without(particles=4, repulsion=0.0),
    "sfpk, four, hard vote": without(particles=4, vote="hard"),
    "sfpk, four, best alone": without(particles=4, vote_ratio=0.25),
    "population, no repulsion": population(repulsion=0.0),
    "population, λ = 1": population(repulsion=1.0),
    "population of four": population(4),
    "population, no consensus": population(consensus=0.0),
    "population, no retraction": population(retract=False),
    "population, r = 1.4": population(radius=1.4),
    "population, r = 4": population(radius=4.0),
    "population, perturbed start": population(start=perturbed),
    "population, half of them vote": population(vote_ratio=0.5),
}
STUDIED = [name for name, method in METHODS.items() if method.changes is None]

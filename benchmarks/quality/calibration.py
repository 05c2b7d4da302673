"""``python -m benchmarks.quality.calibration``: what the share of the particles that keep a weight foretells.

Two populations with batches of their own, nothing drawing their particles together. Of the weights that a share p of
the first keeps: which share of the second does? And what happens to the loss when a tenth of the kept weights goes, the
ones that fewest particles keep, those of lowest score, or any?
"""

from __future__ import annotations

import argparse
import copy
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from sfpk_kernels import Execution, MaskSet, PruneResult, SFPKConfig, prune

from .study import TASKS
from .task import Problem, Task

_TENTH = 0.1
BINS = 5  # of the shares strictly between 0 and 1


def population(problem: Problem, sparsity: float, particles: int, steps: int, seed: int) -> PruneResult:
    """A run whose particles see batches of their own."""
    config = SFPKConfig(sparsity, n_particles=particles, n_steps=steps, consensus=0.0, seed=seed)
    return prune(
        problem.model, problem.batches(seed), loss_fn=problem.loss_fn, config=config, execution=Execution(),
        progress=False, **problem.options,
    )  # fmt: skip


def calibration(foretold: Tensor, found: Tensor, bins: int = BINS) -> list[tuple[float, float, int]]:
    """Mean share foretold, mean share found, and how many weights: of those with 0, of each bin, of those with 1.

    Args:
        foretold: (d,) in [0, 1].
        found: (d,) in [0, 1].
        bins: of equal width, of the shares strictly between.
    """
    inner = (foretold > 0) & (foretold < 1)
    place = (foretold * bins).long().clamp_(max=bins - 1)
    groups = [foretold == 0, *(inner & (place == number) for number in range(bins)), foretold == 1]
    return [
        (float(foretold[group].mean()), float(found[group].mean()), int(group.sum())) for group in groups if group.any()
    ]


def loss_of(problem: Problem, task: Task, mask: MaskSet) -> float:
    """What the task measures."""
    return problem.measure(mask.apply_(copy.deepcopy(problem.model)))


def without_a_tenth(mask: MaskSet, order: Tensor) -> MaskSet:
    """A mask without the tenth of its kept weights that come first in an order: (d,), ascending."""
    flat = mask.flat()
    kept = flat.nonzero().flatten()
    gone = kept[order[kept].argsort(stable=True)[: round(_TENTH * len(kept))]]
    flat = flat.clone()
    flat[gone] = False
    sizes = [mask[name].numel() for name in mask]
    parts = flat.split(sizes)
    return MaskSet({name: part.view(mask[name].shape) for name, part in zip(mask, parts, strict=True)})


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.calibration", description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["digits", "mnist-mlp", "lm"], metavar="TASK")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--particles", type=int, default=10)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args(arguments)
    for name in options.tasks:
        task = TASKS[name]
        problem = task.build(0)
        first, second = (population(problem, options.sparsity, options.particles, options.steps, s) for s in (0, 1))
        foretold, found = (
            torch.cat([part.flatten() for part in run.keep_probability().values()]) for run in (first, second)
        )
        print(f"{name}, {100 * options.sparsity:g} % removed, {options.particles} particles, {options.steps} steps")
        for share, share_found, count in calibration(foretold, found):
            print(f"  kept by {share:.2f} of one population, {share_found:.2f} of the other: {count} weights")
        orders = {"share": foretold, "score": first.score, "chance": torch.rand(len(foretold))}
        for kind, order in orders.items():
            print(f"  a tenth less, by {kind}: {loss_of(problem, task, without_a_tenth(first.mask, order)):.3f}")
        print(f"  {task.metric} of the mask: {loss_of(problem, task, first.mask):.3f}")
    return 0


if __name__ == "__main__":
    logging.getLogger("sfpk_kernels").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    main()

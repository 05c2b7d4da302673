"""What is done with a method's mask, at equal passes in all: nothing, fine-tuning once, or both in turns.

A pass of fine-tuning is one step of ``finetune_masked`` on one mini-batch. Search and fine-tuning share the passes in
halves; a method that needs none fine-tunes for all of them.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

from torch import nn

from sfpk_kernels import GradualPruner, MaskSet, SFPKConfig, finetune_masked
from sfpk_kernels.retraining.shots import Shot, schedule_shots, spread_steps

from .methods import Method
from .records import ONE_SHOT, Cell
from .task import Problem, Task

SHOTS = 5  # of gradual pruning
_APART = 500_000  # between the seeds of the batches of a search and of the fine-tuning after it

Protocol = Callable[[Method, Task, Problem, Cell], tuple[MaskSet, nn.Module]]  # the mask, and a copy pruned by it


def _one_shot(method: Method, task: Task, problem: Problem, cell: Cell) -> tuple[MaskSet, nn.Module]:
    """The mask alone."""
    mask = method.search(problem, cell.sparsity, cell.passes, cell.seed)
    return mask, mask.apply_(copy.deepcopy(problem.model))


def _fine_tuned(method: Method, task: Task, problem: Problem, cell: Cell) -> tuple[MaskSet, nn.Module]:
    """The mask of half of the passes, the weights that it keeps trained for the rest."""
    searched, trained = halves(method, cell.passes)
    mask = method.search(problem, cell.sparsity, searched, cell.seed)
    model = copy.deepcopy(problem.model)
    _Tuning(task, problem, cell.seed)(model, mask, trained)
    return mask, model


def _gradual(method: Method, task: Task, problem: Problem, cell: Cell) -> tuple[MaskSet, nn.Module]:
    """Shot by shot: a search goes on from its particles, a score is taken anew on the trained weights."""
    searched, trained = halves(method, cell.passes)
    model, tune = copy.deepcopy(problem.model), _Tuning(task, problem, cell.seed)
    if method.config is not None:
        config = method.config(cell.sparsity, searched, cell.seed)
        pruner = GradualPruner(
            model,
            problem.batches(cell.seed),
            loss_fn=problem.loss_fn,
            config=config,
            shots=min(SHOTS, config.n_steps),
            retrain=lambda model, mask, shot: tune(model, mask, steps[shot.number - 1]),
            progress=False,
            **problem.options,
        )
        steps = _steps(pruner.shots, trained)
        return pruner.run().mask, model
    shots = schedule_shots(SFPKConfig(cell.sparsity, n_steps=SHOTS), SHOTS)
    for shot, count in zip(shots, _steps(shots, trained), strict=True):
        sparsity = cell.sparsity if shot.number == SHOTS else shot.sparsity  # without rounding
        mask = method.search(dataclasses.replace(problem, model=model), sparsity, 0, cell.seed)
        tune(model, mask, count)
    return mask, model


PROTOCOLS: dict[str, Protocol] = {ONE_SHOT: _one_shot, "fine-tuned": _fine_tuned, "gradual": _gradual}


def exists(protocol: str, method: Method) -> bool:
    """Whether the method can go through it."""
    return protocol != "gradual" or method.config is not None or method.repeats


def halves(method: Method, passes: int) -> tuple[int, int]:
    """Passes of search and of fine-tuning."""
    searched = 0 if method.free else passes // 2
    return searched, passes - searched


def _steps(shots: list[Shot], passes: int) -> list[int]:
    return spread_steps(passes, [shot.share for shot in shots])


class _Tuning:
    """``finetune_masked``, over batches that go on from call to call."""

    def __init__(self, task: Task, problem: Problem, seed: int):
        self._rate, self._loss_fn, self._seed = task.rate, problem.loss_fn, seed
        self._batches = problem.batches(_APART + seed)

    def __call__(self, model: nn.Module, mask: MaskSet, steps: int) -> None:
        """Train in place for so many steps."""
        if steps == 0:
            mask.apply_(model)
            return
        finetune_masked(
            model, mask, self._batches, loss_fn=self._loss_fn, steps=steps, lr=self._rate, seed=self._seed,
            progress=False,
        )  # fmt: skip

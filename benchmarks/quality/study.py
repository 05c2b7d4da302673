"""Measure the cells that are missing, one after the other; killed at any moment, it goes on where it was."""

from __future__ import annotations

import copy
import importlib.metadata
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch

from sfpk_kernels import __version__
from sfpk_kernels.search.unreached import NoGradientError

from . import encoder, images, pitch, text
from .methods import METHODS
from .protocols import PROTOCOLS, exists
from .records import ABOUT, ONE_SHOT, Cell, Row, append, label, read
from .task import Problem, Task

TASKS: dict[str, Task] = {task.name: task for task in (*images.TASKS, *text.TASKS, *encoder.TASKS, *pitch.TASKS)}


def cells(
    tasks: Sequence[str],
    methods: Sequence[str],
    sparsities: Sequence[float] | None,  # None: those of each task
    passes: Sequence[int],
    seeds: Sequence[int],
    protocols: Sequence[str] = (ONE_SHOT,),
    telling: bool = False,  # of the sparsities of each task only the one that tells
) -> Iterator[Cell]:
    """The cells of a study that exist, seed by seed: what is stopped early has all of the first seeds."""
    for seed in seeds:
        for task in tasks:
            for sparsity in (TASKS[task].telling,) if telling else TASKS[task].sparsities:
                if sparsities is not None and sparsity not in sparsities:
                    continue
                for method, protocol in itertools.product(methods, protocols):
                    if METHODS[method].exists(TASKS[task]) and exists(protocol, METHODS[method]):
                        once = METHODS[method].free and protocol == ONE_SHOT
                        for count in (0,) if once else passes:
                            yield Cell(task, method, sparsity, count, seed, protocol)


def run(wanted: Iterable[Cell], path: Path, say: Callable[[str], None]) -> None:
    """Measure what ``path`` does not hold yet, and append it; a method that finds no gradient is said and left out."""
    known = {row.cell for row in read(path)}
    built: tuple[tuple[str, int], Problem, float] | None = None
    facts = (__version__, importlib.metadata.version("torch"), torch.get_num_threads())
    about = dict(zip(ABOUT, facts, strict=True))
    for cell in wanted:
        if cell in known:
            continue
        if built is None or built[0] != (cell.task, cell.seed):
            problem = TASKS[cell.task].build(cell.seed)
            built = (cell.task, cell.seed), problem, problem.measure(copy.deepcopy(problem.model))
        _, problem, dense = built
        name = f"{cell.task}, seed {cell.seed}: {label(cell)} at {100 * cell.sparsity:g} %, {cell.passes} passes"
        started = time.perf_counter()
        try:
            mask, pruned = PROTOCOLS[cell.protocol](METHODS[cell.method], TASKS[cell.task], problem, cell)
        except (NoGradientError, FloatingPointError) as error:  # no score there: the others go on
            say(f"{name}: left out: {error}")
            continue
        seconds = time.perf_counter() - started
        value = problem.measure(pruned)
        if not math.isfinite(value):
            value = -math.inf if TASKS[cell.task].higher else math.inf
        layers = {name: (int(mask[name].count_nonzero()), mask[name].numel()) for name in mask}
        append(path, Row(cell, value, dense, mask.kept, seconds, layers, about))
        say(f"{name}: {value:.3f} (dense {dense:.3f}), {seconds:.1f} s")

"""What channels, heads and neurons need beside: inputs to call the model with, files of what stays, their times."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import SFPKConfig
from ..export.export import export
from ..export.measure import Latency
from ..modeling.state import seeded
from ..search.result import PruneResult
from ..search.structured import timing
from ..search.structured.result import StructuredResult
from ..structure import ShrinkRecipe, Structure
from ..utils.files import atomic_write
from ._outcome import WrongOption, recalibrate
from ._task import Task, WrongTask

logger = logging.getLogger(__name__)

RECIPE = "recipe.json"
SHRUNK = "shrunk.safetensors"


def check_structured(options: argparse.Namespace, config: SFPKConfig) -> None:
    """That what only a smaller model has is asked of a run that leaves one.

    Raises:
        WrongOption: it is not.
    """
    for name in ("shrunk", "latency"):
        if getattr(options, name) and config.granularity == "weight":
            raise WrongOption(f"--{name}: wanted with --granularity channel, head, neuron or group, got without")


def inputs_of(task: Task, config: SFPKConfig) -> dict[str, Any]:
    """``example_inputs`` from the first batch: all of a dict, else what comes first in it; nothing for single weights.

    Raises:
        WrongTask: no batch, or a loader that can be read only once.
    """
    if config.granularity == "weight":
        return {}
    device = next((parameter.device for parameter in task.model.parameters()), torch.device("cpu"))
    with seeded(config.seed, device):  # what the loader draws is not missing afterwards
        batches = iter(task.loader)
        if batches is task.loader:
            raise WrongTask(
                f"loader: wanted one that can be read again with --granularity {config.granularity}, got an iterator"
            )
        batch = next(batches, None)
    if batch is None:
        raise WrongTask("loader: wanted batches, got an empty iterable")
    return {"example_inputs": batch[0] if isinstance(batch, tuple | list) and batch else batch}


def write_recipe(recipe: ShrinkRecipe, before: Mapping[str, int], after: Mapping[str, int], folder: Path) -> str:
    """What stays, as JSON (:meth:`ShrinkRecipe.from_dict`), with the costs, in ``folder``: the file."""
    values = {"recipe": recipe.to_dict(), "costs_before": dict(before), "costs_after": dict(after)}
    with atomic_write(folder / RECIPE) as path:
        path.write_text(json.dumps(values), encoding="utf-8")
    return str(folder / RECIPE)


def write_shrunk(recipe: ShrinkRecipe, task: Task, folder: Path, bn_batches: int) -> str:
    """The smaller model with its own batch-norm statistics, in ``folder``: the file."""
    smaller = recipe.shrink(task.model)
    recalibrate(smaller, task, bn_batches)
    export(smaller, folder / SHRUNK, kind="shrunk", recipe=recipe)
    return str(folder / SHRUNK)


def files_of(result: PruneResult, task: Task, options: argparse.Namespace) -> list[str]:
    """Files of what stays, and of the smaller model where it is asked for; none for single weights."""
    if not isinstance(result, StructuredResult):
        return []
    recipe = result.recipe()
    files = [write_recipe(recipe, result.costs_before, result.costs_after, options.out)]
    return [*files, write_shrunk(recipe, task, options.out, options.bn_batches)] if options.shrunk else files


def smaller_of(structure: Structure, recipe: ShrinkRecipe, model: nn.Module) -> Callable[[], nn.Module] | None:
    """What makes the smaller model, where it is not the masked one: norms over a pruned width see the kept alone."""
    return (lambda: recipe.shrink(model)) if structure.norms else None


def times_of(result: PruneResult, task: Task, example_inputs: Any) -> list[Latency]:
    """:func:`latency_of` what a run has found."""
    assert isinstance(result, StructuredResult)  # check_structured
    return latency_of(result.recipe(), task, example_inputs)


def other_model(result: PruneResult, task: Task) -> Callable[[], nn.Module] | None:
    """:func:`smaller_of` what a run has found; None for single weights."""
    if not isinstance(result, StructuredResult):
        return None
    return smaller_of(result.structure, result.recipe(), task.model)


def latency_of(recipe: ShrinkRecipe, task: Task, example_inputs: Any) -> list[Latency]:
    """Times of the dense and of the smaller model; none, and a word, where the model cannot be called so."""
    try:
        return timing.latency_of(task.model, recipe, example_inputs)
    except Exception as error:  # of the user's model, which need not take another number of rows
        logger.warning("latency was not measured: %s: %s", type(error).__name__, error)
        return []


def described(result: PruneResult, latency: Sequence[Latency]) -> str:
    """What a run has found, in words."""
    if not isinstance(result, StructuredResult):
        return str(result.mask)
    return with_times(str(result), latency)


def with_times(text: str, latency: Sequence[Latency]) -> str:
    """Tables, and times below them."""
    rows = [*map(str, latency), ""] if latency else []
    return "\n".join([text, "", *rows])

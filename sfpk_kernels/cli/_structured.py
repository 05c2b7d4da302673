"""What channels, heads and neurons need beside: inputs to call the model with, files of what stays, their times."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..config import SFPKConfig
from ..export.export import export
from ..export.measure import Latency
from ..modeling.state import seeded
from ..search.result import PruneResult
from ..search.structured.result import StructuredResult
from ..utils.files import atomic_write
from ._outcome import WrongOption, in_words, recalibrate
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


def write_recipe(result: PruneResult, folder: Path) -> list[str]:
    """What stays, as JSON (:meth:`ShrinkRecipe.from_dict`), in ``folder``; nothing for single weights."""
    if not isinstance(result, StructuredResult):
        return []
    values = {
        "recipe": result.recipe().to_dict(),
        "costs_before": result.costs_before,
        "costs_after": result.costs_after,
    }
    with atomic_write(folder / RECIPE) as path:
        path.write_text(json.dumps(values), encoding="utf-8")
    return [str(folder / RECIPE)]


def write_shrunk(result: PruneResult, task: Task, folder: Path, bn_batches: int) -> list[str]:
    """The smaller model with its own batch-norm statistics, in ``folder``."""
    assert isinstance(result, StructuredResult)
    smaller = result.shrink(task.model)
    recalibrate(smaller, task, bn_batches)
    export(smaller, folder / SHRUNK, kind="shrunk", recipe=result)
    return [str(folder / SHRUNK)]


def latency_of(result: PruneResult, task: Task, example_inputs: Any) -> list[Latency]:
    """Times of the dense and of the smaller model; none, and a word, where the model cannot be called so."""
    assert isinstance(result, StructuredResult)
    try:
        return result.latency(task.model, example_inputs)
    except Exception as error:  # of the user's model, which need not take another number of rows
        logger.warning("latency was not measured: %s: %s", type(error).__name__, error)
        return []


def described(result: PruneResult, latency: Sequence[Latency]) -> str:
    """What a run has found, in words."""
    if not isinstance(result, StructuredResult):
        return in_words(result.mask, result.coordinates)
    rows = [*map(str, latency), ""] if latency else []
    return "\n".join([str(result), "", *rows])

"""What channels, heads and neurons need beside: inputs to call the model with, and a file of what stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ..config import SFPKConfig
from ..modeling.state import seeded
from ..search.result import PruneResult
from ..search.structured.result import StructuredResult
from ..utils.files import atomic_write
from ._task import Task, WrongTask

RECIPE = "recipe.json"


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

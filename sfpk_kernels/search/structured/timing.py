"""Seconds of a call of the dense and of the smaller model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ...coordinates.flat import unwrapped
from ...export.measure import Latency, compare_latency
from ...modeling.batches import move_to
from ...modeling.turns import lock
from ...structure import ShrinkRecipe
from ...structure.find import split_inputs
from ...utils.arguments import check_least


def latency_of(
    model: nn.Module, recipe: ShrinkRecipe, example_inputs: Any, batches: Sequence[int] = (1, 16), runs: int = 20
) -> list[Latency]:
    """Measured by turns, on the model's device.

    Args:
        model: the dense one; it stays as it is.
        recipe: what the smaller one keeps.
        example_inputs: what the model is called with; rows along dim 0 are repeated.
        batches: so many rows in a call, ≥ 1.
        runs: calls behind each median, ≥ 1.

    Raises:
        TypeError, ValueError: another model, inputs of another kind, sizes or runs below 1.
    """
    check_least("runs", runs, 1)
    for batch in batches:
        check_least("batches", batch, 1)
    model = unwrapped(model)
    smaller = recipe.shrink(model)
    args, kwargs = split_inputs(move_to(example_inputs, next(model.parameters()).device))
    with lock():  # no other thread's pruner has other weights in it
        return compare_latency(model, smaller, args, kwargs, batches, runs)

"""Global magnitude pruning: keep the largest weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..coordinates.flat import Coordinates
from ..masks.maskset import MaskSet
from ..search.energy import LossFn
from ._select import select


def magnitude(
    model: nn.Module,
    loss_fn: LossFn | None,  # not used: all baselines share one signature
    loader: Iterable[Any] | None,  # not used
    sparsity: float,
    **coordinate_options: Any,
) -> MaskSet:
    """The round((1 - sparsity)·d) weights of largest |θ| over all prunable tensors together.

    ``coordinate_options`` are those of :class:`~sfpk_kernels.Coordinates`. The model is not changed.

    Raises:
        ValueError: a sparsity outside (0, 1), or nothing prunable.
    """
    coordinates = Coordinates(model, **coordinate_options)
    return select(coordinates, coordinates.flatten(model).abs(), sparsity)

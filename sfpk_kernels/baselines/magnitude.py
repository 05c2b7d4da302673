"""Global magnitude pruning: keep the largest weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..coordinates.flat import Coordinates
from ..masks.maskset import MaskSet
from ..utils.arguments import called
from ._select import select


@called("magnitude(model, sparsity)")
def magnitude(
    model: nn.Module,
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

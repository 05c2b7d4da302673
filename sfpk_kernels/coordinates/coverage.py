"""How much of a model's weights a run covers, and a word where that is little."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from .flat import Coordinates

logger = logging.getLogger(__name__)

ENOUGH = 0.8  # of the weights that were not left out on purpose
_NAMED = 3  # tensors, in one message
_said: set[str] = set()  # in this process


def coordinates_for(model: nn.Module, **options: Any) -> Coordinates:
    """The coordinates that a run prunes; a warning, once for the same model, where they leave much of it out.

    Args:
        model, options: of :class:`Coordinates`, whose errors apply.
    """
    coordinates = Coordinates(model, **options)
    words = uncovered(coordinates)
    if words is not None and words not in _said:
        _said.add(words)
        logger.warning("%s", words)
    return coordinates


def uncovered(coordinates: Coordinates) -> str | None:
    """What is not covered and how it would be, where that is much; None where it is not.

    What ``ignored_layers`` names is left out on purpose, and not counted.
    """
    left = sorted((skip for skip in coordinates.skipped if not skip.ignored), key=lambda skip: -skip.numel)
    total = coordinates.d + sum(skip.numel for skip in left)
    if coordinates.d >= ENOUGH * total:
        return None
    named = "; ".join(
        f"{skip.name} of {'×'.join(map(str, skip.shape)) or '1'} ({skip.reason})" for skip in left[:_NAMED]
    )
    more = f"; and {len(left) - _NAMED} more" if len(left) > _NAMED else ""
    return (
        f"{coordinates.d / total:.0%} of the model's weights are covered, {coordinates.d:,} of {total:,}: the sparsity "
        f"is of these alone, the others stay. The largest: {named}{more}"
    )

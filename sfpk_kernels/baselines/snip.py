"""SNIP (Lee et al., ICLR 2019): keep the weights whose removal changes the loss most, to first order."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..coordinates.coverage import coordinates_for
from ..masks.maskset import MaskSet
from ..modeling.state import autograd_allowed
from ..search.energy import LossFn
from ..search.unreached import NoGradientError
from ..utils.arguments import called
from ._passes import batches, check_data, gradients
from .select import check_allocation, check_sparsity, select


@called("snip(model, loader, sparsity, loss_fn=…)")
@autograd_allowed()
def snip(
    model: nn.Module,
    loader: Iterable[Any],
    sparsity: float,
    *,
    loss_fn: LossFn | None = None,
    max_batches: int | None = None,
    allocation: str = "global",
    **coordinate_options: Any,
) -> MaskSet:
    """The round((1 - sparsity)·d) weights of largest connection sensitivity |θ ⊙ ∂L/∂θ|.

    With one batch this is the published score; over several it is the mean of their scores, which is the
    stronger variant on trained networks, where the mean gradient itself is close to zero. Batch-norm uses
    batch statistics, as in the energies of SFPK. The model is not changed.

    Args:
        model: the trained model.
        loader: batches; one pass over it.
        sparsity: fraction removed, in (0, 1).
        loss_fn: ``loss_fn(model, batch) -> scalar``; ``None`` for the default loss.
        max_batches: use only the first ones; ``None`` for all.
        allocation: ``"global"`` (published), ``"uniform"``, ``"erk"`` or ``"lamp"``, as for :func:`magnitude`.
        coordinate_options: those of :class:`~sfpk_kernels.Coordinates`.

    Raises:
        ValueError: an empty loader, a sparsity outside (0, 1), nothing prunable, an unknown allocation, or gradients
            that are all zero.
        FloatingPointError: a loss that is not finite.
    """
    check_data(loader, loss_fn, max_batches)
    check_sparsity(sparsity)
    check_allocation(allocation)
    coordinates = coordinates_for(model, **coordinate_options)
    theta = coordinates.flatten(model)
    dense = torch.ones_like(theta, dtype=torch.bool)
    score, count = torch.zeros_like(theta), 0
    with gradients(model, loss_fn, coordinates, theta) as gradient:
        for batch in batches(loader, max_batches, coordinates.device):
            score += (theta * gradient(dense, batch)).abs()
            count += 1
    if not bool(score.any()):
        raise NoGradientError("batch")
    return select(coordinates, score / count, sparsity, allocation)

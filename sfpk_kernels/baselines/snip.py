"""SNIP (Lee et al., ICLR 2019): keep the weights whose removal changes the loss most, to first order."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import nn

from ..coordinates.flat import Coordinates
from ..masks.maskset import MaskSet
from ..modeling.batches import default_loss, move_to
from ..modeling.state import autograd_allowed, check_no_inference_tensors, guarded
from ..search.energy import LossFn, ParticleEnergy
from ..search.unreached import NoGradientError
from ..utils.arguments import called, check_loader, check_loss_fn
from ._select import check_sparsity, select


@called("snip(model, loader, sparsity, loss_fn=…)")
@autograd_allowed()
def snip(
    model: nn.Module,
    loader: Iterable[Any],
    sparsity: float,
    *,
    loss_fn: LossFn | None = None,
    max_batches: int | None = None,
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
        coordinate_options: those of :class:`~sfpk_kernels.Coordinates`.

    Raises:
        ValueError: an empty loader, a sparsity outside (0, 1), nothing prunable, or gradients that are all zero.
        FloatingPointError: a loss that is not finite.
    """
    check_loader(loader)
    check_loss_fn(loss_fn)
    check_sparsity(sparsity)
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches: wanted ≥ 1 or None, got {max_batches}")
    coordinates = Coordinates(model, **coordinate_options)
    check_no_inference_tensors(model)
    theta = coordinates.flatten(model)
    energy = ParticleEnergy(model, loss_fn or default_loss, coordinates, theta, mode="sequential")
    dense = torch.ones_like(theta, dtype=torch.bool).unsqueeze(0)
    score = torch.zeros_like(theta)
    batches = 0
    with guarded(model, bn="batch", training=False):
        for batch in islice(loader, max_batches):
            losses, grads = energy(dense, [move_to(batch, coordinates.device)])
            if not bool(torch.isfinite(losses).all()):
                raise FloatingPointError(f"loss_fn: wanted a finite loss, got {float(losses[0])} in batch {batches}")
            score += (theta * grads[0]).abs()
            if not bool(torch.isfinite(score).all()):
                raise FloatingPointError(f"loss_fn: wanted a finite gradient, got another in batch {batches}")
            batches += 1
    if batches == 0:
        raise ValueError("loader: wanted batches, got an empty iterable")
    if not bool(score.any()):
        raise NoGradientError("batch")
    return select(coordinates, score / batches, sparsity)

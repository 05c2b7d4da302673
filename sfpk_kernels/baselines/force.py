"""FORCE and iterative SNIP (de Jorge et al., ICLR 2021): connection sensitivity, scored anew as the network thins."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..coordinates.coverage import coordinates_for
from ..masks.maskset import MaskSet
from ..modeling.batches import BatchStream
from ..modeling.state import autograd_allowed, seeded
from ..modeling.turns import alone
from ..ops import topk_mask
from ..search.energy import LossFn
from ..search.polarizer import budget
from ..search.schedule import density_schedule
from ..search.unreached import NoGradientError
from ..utils.arguments import called, check_least
from ._passes import check_data, gradients
from .select import check_sparsity, select


@called("force(model, loader, sparsity, loss_fn=…)")
@alone
@autograd_allowed()
def force(
    model: nn.Module,
    loader: Iterable[Any],
    sparsity: float,
    *,
    loss_fn: LossFn | None = None,
    rounds: int = 60,
    batches_per_round: int = 1,
    revive: bool = True,
    seed: int = 0,
    **coordinate_options: Any,
) -> MaskSet:
    """The round((1 - sparsity)·d) weights of largest foresight connection sensitivity, found in rounds.

    Round k of K scores |θ ⊙ ∂L/∂W| at W = P ⊙ θ, P the mask of the round before, and keeps the best to a density of
    ρ^(k/K) (*Progressive skeletonization*, section 4: FORCE with its exponential schedule). Removed weights have a
    gradient, too, and may return; without ``revive`` they stay removed, which is the paper's iterative SNIP. One round
    is :func:`snip`: over several batches the score is the mean of theirs. Costs rounds · batches_per_round forward and
    backward passes. Batch-norm uses batch statistics. The model is not changed.

    Args:
        model: the model; the paper's are at initialization.
        loader: batches, taken in order, from the beginning again whenever it ends.
        sparsity: fraction removed, in (0, 1).
        loss_fn: ``loss_fn(model, batch) -> scalar``; ``None`` for the default loss.
        rounds: K.
        batches_per_round: behind each score.
        revive: whether removed weights may return.
        seed: of the loader's order.
        coordinate_options: those of :class:`~sfpk_kernels.Coordinates`.

    Raises:
        ValueError: an empty loader or a one-shot iterator that runs out, a sparsity outside (0, 1), nothing prunable,
            a number below 1, or gradients that are all zero in a round.
        FloatingPointError: a loss or gradient that is not finite.
    """
    check_data(loader, loss_fn)
    check_sparsity(sparsity)
    check_least("rounds", rounds, 1)
    check_least("batches_per_round", batches_per_round, 1)
    check_least("seed", seed, 0)
    coordinates = coordinates_for(model, **coordinate_options)
    theta = coordinates.flatten(model)
    least = budget(float(sparsity), coordinates.d)
    mask, score = torch.ones_like(theta, dtype=torch.bool), torch.zeros_like(theta)
    with seeded(seed, coordinates.device), gradients(model, loss_fn, coordinates, theta) as gradient:
        needed = rounds * batches_per_round
        stream = BatchStream(loader, coordinates.device, needed, "rounds × batches_per_round")
        for density in density_schedule("exponential", 1.0 - float(sparsity), rounds)[1:]:
            score.zero_()
            for _ in range(batches_per_round):
                score += (theta * gradient(mask, stream.take(1)[0])).abs()
            if not bool(score.any()):
                raise NoGradientError("batch of a round")
            score /= batches_per_round
            if not revive:
                score.masked_fill_(~mask, -1.0)
            mask = topk_mask(score, max(least, round(density * coordinates.d)))
    return select(coordinates, score, sparsity)

"""One particle by itself: what SFPK is without a population."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..config import SFPKConfig
from ..masks.maskset import MaskSet
from ..search.energy import LossFn
from ..search.prune import prune
from ..utils.arguments import called, check_least
from .select import check_sparsity


@called("single_particle(model, loader, sparsity, loss_fn=…)")
def single_particle(
    model: nn.Module,
    loader: Iterable[Any],
    sparsity: float,
    *,
    loss_fn: LossFn | None = None,
    passes: int = 1000,
    seed: int = 0,
    **coordinate_options: Any,
) -> MaskSet:
    """The mask of SFPK with n = 1: one particle, which nothing repels, pulls or outvotes.

    Its path is deterministic given the batches: that of equation 8 of Mo, Shi and Pan (ICLR 2025) without interaction,
    at the settings of the preset ``"population"`` otherwise. Set beside that preset with as many passes (n · K), it
    says what the other particles are worth. The model is not changed.

    Args:
        model: the trained model.
        loader: batches, taken in order, from the beginning again whenever it ends.
        sparsity: fraction removed, in (0, 1).
        loss_fn: ``loss_fn(model, batch) -> scalar``; ``None`` for the default loss.
        passes: forward and backward passes, each a step.
        seed: of the loader's order.
        coordinate_options: those of :class:`~sfpk_kernels.Coordinates`.

    Raises:
        ValueError: a number out of its range, and what :func:`sfpk_kernels.prune` raises.
        FloatingPointError: a loss or gradient that is not finite.
    """
    check_sparsity(sparsity)
    check_least("passes", passes, 1)
    check_least("seed", seed, 0)
    config = SFPKConfig.preset("population", sparsity=float(sparsity), n_particles=1, n_steps=passes, seed=seed)
    return prune(model, loader, config=config, loss_fn=loss_fn, progress=False, **coordinate_options).mask

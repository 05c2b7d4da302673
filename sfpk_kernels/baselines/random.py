"""Random pruning: the floor any method has to stand on."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..coordinates.coverage import coordinates_for
from ..masks.maskset import MaskSet
from ..utils.arguments import called
from .select import check_allocation, check_sparsity, select


@called("random(model, sparsity, seed=…)")
def random(
    model: nn.Module,
    sparsity: float,
    *,
    seed: int = 0,
    allocation: str = "global",
    **coordinate_options: Any,
) -> MaskSet:
    """round((1 - sparsity)·d) weights drawn at random, every choice equally likely. The model is not changed.

    With ``allocation="erk"`` the random masks that Liu et al., *The unreasonable effectiveness of random pruning* (ICLR
    2022), find strongest.

    Args:
        model: any model; its weights play no part.
        sparsity: fraction removed, in (0, 1).
        seed: of the draw, which is the same on every device and leaves torch's generators alone.
        allocation: ``"global"``, ``"uniform"`` or ``"erk"``, as for :func:`magnitude`.
        coordinate_options: those of :class:`~sfpk_kernels.Coordinates`.

    Raises:
        ValueError: a sparsity outside (0, 1), nothing prunable, or another allocation.
    """
    check_sparsity(sparsity)
    check_allocation(allocation, ("global", "uniform", "erk"))
    coordinates = coordinates_for(model, **coordinate_options)
    # fp64: of 2^53 values hardly two are equal, so that the tie rule decides nothing.
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(coordinates.d, dtype=torch.float64, device="cpu", generator=generator)
    return select(coordinates, score.to(coordinates.device), sparsity, allocation)

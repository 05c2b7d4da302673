"""Magnitude pruning: keep the largest weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..coordinates.coverage import coordinates_for
from ..coordinates.pattern import check_pattern
from ..masks.maskset import MaskSet
from ..utils.arguments import called
from .select import check_sparsity, select, select_pattern


@called("magnitude(model, sparsity)")
def magnitude(
    model: nn.Module,
    sparsity: float,
    *,
    allocation: str = "global",
    pattern: tuple[int, int] | None = None,
    **coordinate_options: Any,
) -> MaskSet:
    """The round((1 - sparsity)·d) weights of largest |θ|. The model is not changed.

    Args:
        model: the trained model.
        sparsity: fraction removed, in (0, 1).
        allocation: ``"global"``: the largest of all prunable tensors together (Han et al., NeurIPS 2015).
            ``"uniform"``: of every tensor the same fraction. ``"erk"``: of every tensor as many as the
            Erdős-Rényi-Kernel rule gives it (Evci et al., *Rigging the lottery*, ICML 2020, section 3). ``"lamp"``:
            LAMP, by θ_u² / Σ θ_v² over the weights of its tensor that are no smaller (Lee et al., *Layer-adaptive
            sparsity for the magnitude-based pruning*, ICLR 2021, section 2).
        pattern: (N, M): N of every M consecutive weights along the inputs instead, for a sparsity of
            1 - N/M.
        coordinate_options: those of :class:`~sfpk_kernels.Coordinates`.

    Raises:
        ValueError: a sparsity outside (0, 1), nothing prunable, an unknown allocation, or a pattern with an
            allocation, another sparsity or tensors that it does not divide.
    """
    check_sparsity(sparsity)
    check_pattern(pattern, sparsity)
    if pattern is not None and allocation != "global":
        raise ValueError(f"allocation: wanted 'global' with a pattern, which fixes how many, got {allocation!r}")
    coordinates = coordinates_for(model, **coordinate_options)
    score = coordinates.flatten(model).abs()
    if pattern is not None:
        return select_pattern(coordinates, score, pattern)
    return select(coordinates, score, sparsity, allocation)

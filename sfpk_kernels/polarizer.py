"""The polarizer: which coordinates of a soft particle count as kept."""

from __future__ import annotations

import torch
from torch import Tensor

from .coordinates import Coordinates
from .ops import topk_mask


class Polarizer:
    """Scores coordinates and makes particles binary (method step 1).

    Args:
        coordinates: of the model, for the tensors' means.
        theta: dense weights (d,).
        selection: ``"exact"``: exactly round(ρ·d) coordinates, ties to the lower index. ``"threshold"``: the
            authors' released rule: with p = int((1 - ρ) d), keep every score ≥ the p-th smallest, and use
            the soft mask itself while p < 1.
        backend: of the selection op.
    """

    def __init__(self, coordinates: Coordinates, theta: Tensor, selection: str, backend: str | None = None):
        self._saliency = theta.abs()  # (d,)
        self._normalized = coordinates.normalize(self._saliency)  # (d,)
        self._selection = selection
        self._backend = backend

    @property
    def saliency(self) -> Tensor:
        """a_e = |θ_e|, (d,)."""
        return self._saliency

    def score(
        self,
        masks: Tensor,  # (n, d)
        kind: str,
    ) -> Tensor:  # (n, d)
        """``"mask"``: m; ``"mask_weight"``: |m|·a; ``"mask_normalized"``: |m|·a / mean of a in its tensor."""
        if kind == "mask":
            return masks
        return masks.abs() * (self._saliency if kind == "mask_weight" else self._normalized)

    def binary(
        self,
        masks: Tensor,  # (n, d)
        densities: Tensor,  # (n,) ρ(m_i)
        kind: str,
    ) -> Tensor:  # (n, d) bool; float factors while selection="threshold" removes nothing
        """P_i for every particle."""
        d = masks.shape[1]
        scores = self.score(masks, kind)
        if self._selection == "exact":
            counts = (densities * d).round().clamp(1, d).to(torch.int64)
            return topk_mask(scores, counts, backend=self._backend)
        rows = []
        for mask, score, density in zip(masks, scores, densities.tolist(), strict=True):
            removed = int((1.0 - density) * d)
            rows.append(mask if removed < 1 else (score >= score.kthvalue(removed).values).to(mask.dtype))
        return torch.stack(rows)

    def final(
        self,
        score: Tensor,  # (d,)
        sparsity: float,
    ) -> Tensor:  # (d,) bool
        """The final mask: exactly :func:`budget` coordinates; with ``"threshold"`` the authors' count."""
        d = score.shape[0]
        if self._selection == "exact":
            return topk_mask(score, budget(sparsity, d), backend=self._backend)
        removed = int(sparsity * d)
        return score > score.kthvalue(removed).values if removed else torch.ones_like(score, dtype=torch.bool)


def budget(sparsity: float, d: int) -> int:
    """How many of d weights a sparsity keeps: round((1 - sparsity)·d).

    Raises:
        ValueError: none would be kept.
    """
    kept = round((1.0 - sparsity) * d)
    if kept < 1:
        raise ValueError(f"sparsity: wanted one that keeps at least one of {d} weights, got {sparsity!r}")
    return kept

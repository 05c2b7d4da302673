"""Binary particles over channels, heads and neurons: the best-scored ones that the budget allows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ...structure.select import select, select_within
from ..polarizer import Polarized, Polarizer
from .coordinates import StructuredCoordinates


class StructuredPolarizer(Polarizer):
    """Scores m_c · a_c, and keeps the best whose cost is at most ρ of the dense model's (method step 1).

    At ρ = 1 everything; less than a layer needs to live never: then the fewest coordinates stay. What is selected is
    decided on the host, as costs are products of how many of each group stay.

    Args:
        coordinates: of the model.
        saliency: a_c (C,).
        signed: rank by m·a with its sign.
    """

    def __init__(self, coordinates: StructuredCoordinates, saliency: Tensor, signed: bool):
        super().__init__(coordinates, saliency, "exact", signed=signed)
        self._structured = coordinates

    def polarize(
        self,
        masks: Tensor,  # (n, C)
        densities: Tensor,  # (n,) ρ(m_i)
        kind: str,
        known: Sequence[float] | None = None,
    ) -> Polarized:
        """P_i for every particle, as bool masks; waits for the device once, for all scores."""
        scores = on_host(self.score(masks, kind))
        shares = densities.tolist() if known is None else known
        rows = [self._at(score, share) for score, share in zip(scores, shares, strict=True)]
        return Polarized(on_device(torch.stack(rows), masks.device))

    def keeps(
        self,
        masks: Tensor,  # (n, C)
        densities: Sequence[float],
        kind: str,
        rows: Iterable[int],
    ) -> Tensor:  # (C,)
        """In how many of some binary particles each coordinate is kept; waits for the device once."""
        scores = on_host(self.score(masks, kind))
        kept = torch.zeros(masks.shape[1], dtype=torch.float32, device="cpu")
        for row in rows:
            kept += self._at(scores[row], densities[row])
        return on_device(kept, masks.device)

    def final(
        self,
        score: Tensor,  # (C,)
        sparsity: float,
    ) -> Tensor:  # (C,) bool
        """:func:`~sfpk_kernels.structure.select` for the budget of the run.

        Raises:
            ValueError: NaN, or a sparsity that not even the fewest coordinates reach.
        """
        one = self._structured
        return select(one.structure, one.costs, score, sparsity, one.budget, **one.floors).to(score.device)

    def best(
        self,
        score: Tensor,  # (C,)
        sparsity: float,
    ) -> Tensor:  # (C,) bool
        """The same, and the fewest coordinates where they cost more."""
        return on_device(self._at(on_host(score), 1.0 - sparsity), score.device)

    def _at(self, score: Tensor, share: float) -> Tensor:  # both (C,), on the host
        one = self._structured
        limit = round(min(share, 1.0) * one.costs.dense[one.budget])
        return select_within(one.structure, one.costs, score, limit, one.budget, one.limits)


def on_host(scores: Tensor) -> Tensor:
    """Where coordinates are selected; waited for."""
    return scores.detach().cpu()


def on_device(chosen: Tensor, device: torch.device) -> Tensor:
    """Back where the particles are; not waited for."""
    return chosen.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else chosen.to(device)

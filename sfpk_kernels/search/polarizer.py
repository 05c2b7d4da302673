"""The polarizer: which coordinates of a soft particle count as kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..config import SFPKConfig
from ..coordinates.flat import Coordinates
from ..coordinates.pattern import pattern_mask, sparsity_of
from ..ops import Cut, masked_weights, topk_mask, topk_threshold


@dataclass(frozen=True)
class Polarized:
    """The binary particles P_i, described by values and a cut rather than written as masks.

    Beside a cut the values are the live particles, not a copy: a row is what it was polarized to until that particle
    moves, and not to be read any more then.
    """

    values: Tensor  # (n, d) particles beside a cut; without one a bool mask, or factors
    cut: Cut | None = None  # (n, 1)
    score: str | None = None
    saliency: Tensor | None = None  # (d,)

    def __len__(self) -> int:
        return self.values.shape[0]

    def rows(self, rows: slice) -> Polarized:
        """Some of the particles."""
        cut = None if self.cut is None else Cut(*(part[rows] for part in self.cut))
        return Polarized(self.values[rows], cut, self.score, self.saliency)

    def weights(
        self,
        theta: Tensor,  # (d,)
        *,
        out: Tensor | None = None,  # (n, d)
        backend: str | None = None,
    ) -> Tensor:  # (n, d)
        """P_i ⊙ θ."""
        return masked_weights(
            theta, self.values, cut=self.cut, score=self.score, saliency=self.saliency, out=out, backend=backend
        )


def score_kinds(config: SFPKConfig) -> set[str]:
    """The scores a run needs; each but "mask" has a saliency (d,) of its own, as has the weighted kernel."""
    kinds = {config.polarizer, config.final_score or config.polarizer}
    return kinds | ({"mask_weight"} if config.kernel == "weighted_rbf" else set())


class Polarizer:
    """Scores coordinates and makes particles binary (method step 1).

    Args:
        coordinates: of the model, for the tensors' means.
        theta: dense weights (d,).
        selection: ``"exact"``: exactly round(ρ·d) coordinates, ties to the lower index. ``"threshold"``: the
            authors' released rule: with p = int((1 - ρ) d), keep every score ≥ the p-th smallest, and use
            the soft mask itself while p < 1.
        backend: of the selection op.
        signed: rank by m·a with its sign: what lies below zero ranks last, and not by its distance from zero.
        pattern: (N, M): the N best of every M consecutive weights along the inputs are kept first, then the best of
            the others; with ``"exact"``.
    """

    def __init__(
        self,
        coordinates: Coordinates,
        theta: Tensor,
        selection: str,
        backend: str | None = None,
        signed: bool = False,
        pattern: tuple[int, int] | None = None,
    ):
        self._coordinates = coordinates
        self._theta = theta
        self._selection = selection
        self._backend = backend
        self._signed = signed
        self._pattern = pattern
        self._least = 1 if pattern is None else coordinates.d * pattern[0] // pattern[1]  # that a mask keeps
        self._cuts: dict[str, Cut] = {}  # the last ones by kind: where to look first

    @cached_property
    def saliency(self) -> Tensor:
        """a_e = |θ_e|, (d,)."""
        return self._theta.abs()

    @cached_property
    def _normalized(self) -> Tensor:
        return self._coordinates.normalize_(self._theta.abs())

    def score(
        self,
        masks: Tensor,  # (…, d)
        kind: str,
    ) -> Tensor:  # (…, d)
        """``"mask"``: m; ``"mask_weight"``: |m|·a; ``"mask_normalized"``: |m|·a / mean of a in its tensor.

        Where scores are signed, m stands in place of |m|.
        """
        saliency = self._ranking(kind)["saliency"]
        return masks if saliency is None else self._sized(masks) * saliency

    def _sized(self, masks: Tensor) -> Tensor:
        """What is multiplied with the saliency."""
        return masks if self._signed else masks.abs()

    def mean_score(
        self,
        masks: Tensor,  # (n, d)
        rows: Iterable[int],
        kind: str,
    ) -> Tensor:  # (d,) fp32 at least
        """The scores' mean over some particles, added in their order (as the fused ``"mean_abs_saliency"``)."""
        saliency = self._ranking(kind)["saliency"]
        total, count = masks.new_zeros(masks.shape[1], dtype=torch.promote_types(masks.dtype, torch.float32)), 0
        for row in rows:
            total += masks[row] if saliency is None else self._sized(masks[row])
            count += 1
        return (total if saliency is None else total.mul_(saliency)).mul_(1.0 / count)

    def polarize(
        self,
        masks: Tensor,  # (n, d)
        densities: Tensor,  # (n,) ρ(m_i)
        kind: str,
        known: Sequence[float] | None = None,  # the same densities, where the host knows them
    ) -> Polarized:
        """P_i for every particle; no mask is written (but the authors' float factors, and with a pattern).

        Waits for the device only with ``selection="threshold"``, and only for densities that are not known.
        """
        if self._selection == "exact":
            d = masks.shape[1]
            counts = (densities * d).round().clamp(self._least, d).to(torch.int64)
            if self._pattern is not None:
                keep = torch.empty(masks.shape, dtype=torch.bool, device=masks.device)
                for row, out in enumerate(keep):
                    out.copy_(self._by_pattern(self.score(masks[row], kind), counts[row : row + 1]))
                return Polarized(keep)
            ranking = self._ranking(kind)
            last = self._cuts.get(kind)
            guess = last if last is not None and last.threshold.shape[0] == masks.shape[0] else None
            cut = topk_threshold(masks, counts, guess=guess, backend=self._backend, **ranking)
            self._cuts[kind] = cut
            return Polarized(masks, cut, **ranking)
        return Polarized(
            torch.stack([
                self._above_threshold(mask, density, kind)
                for mask, density in zip(masks, densities.tolist() if known is None else known, strict=True)
            ])
        )  # fmt: skip

    def keeps(
        self,
        masks: Tensor,  # (n, d)
        densities: Sequence[float],  # one per particle
        kind: str,
        rows: Iterable[int],
    ) -> Tensor:  # (d,)
        """In how many of some binary particles each coordinate is kept; waits for nothing."""
        d = masks.shape[1]
        kept = torch.zeros(masks.shape[1], dtype=torch.float32, device=masks.device)
        for row in rows:
            count = min(max(round(densities[row] * d), self._least), d)
            if self._pattern is not None:
                kept += self._by_pattern(self.score(masks[row], kind), _at(masks, count))
            elif self._selection == "exact":
                kept += topk_mask(masks[row], _at(masks, count), backend=self._backend, **self._ranking(kind))
            else:
                kept += self._above_threshold(masks[row], densities[row], kind)
        return kept

    def _by_pattern(
        self,
        score: Tensor,  # (d,)
        count: Tensor,  # (1,) int64
    ) -> Tensor:  # (d,) bool
        """The best of every group, and of the others as many as are left of the count; waits for nothing on a GPU."""
        assert self._pattern is not None
        score = score.to(torch.promote_types(score.dtype, torch.float32))
        first = pattern_mask(self._coordinates, score, self._pattern)
        # Lifted above all others, overflows among them; NaN stays, to be found.
        high = torch.finfo(score.dtype).max / 4
        lifted = score.clamp(min=-high, max=high).add_(first.to(score.dtype), alpha=3 * high)
        return topk_mask(lifted, count, backend=_backend_of(score, self._backend))

    def _above_threshold(self, mask: Tensor, density: float, kind: str) -> Tensor:
        removed = int((1.0 - density) * mask.shape[0])
        if removed < 1:
            return mask
        score = self.score(mask, kind)
        return (score >= score.kthvalue(removed).values).to(mask.dtype)

    def _ranking(self, kind: str) -> dict[str, Any]:
        """Score and saliency as the ops take them."""
        if kind == "mask":
            return {"score": "value", "saliency": None}
        saliency = self.saliency if kind == "mask_weight" else self._normalized
        return {"score": "value_saliency" if self._signed else "abs_saliency", "saliency": saliency}

    def final(
        self,
        score: Tensor,  # (d,)
        sparsity: float,
    ) -> Tensor:  # (d,) bool
        """The final mask: :meth:`best`, of a score that is looked at for NaN.

        Raises:
            ValueError: NaN, or a sparsity that leaves fewer than the pattern keeps.
        """
        if self._pattern is not None and sparsity > sparsity_of(self._pattern) + 1e-9:
            n, m = self._pattern
            raise ValueError(
                f"sparsity: wanted at most {sparsity_of(self._pattern):g}, that of pattern=({n}, {m}), got {sparsity!r}"
            )
        if self._selection == "exact" and bool(score.isnan().any()):
            raise ValueError("score: wanted no NaN, got some")
        return self.best(score, sparsity)

    def best(
        self,
        score: Tensor,  # (d,)
        sparsity: float,
    ) -> Tensor:  # (d,) bool
        """Exactly :func:`budget` coordinates; with ``"threshold"`` the authors' count. Waits for nothing."""
        d = score.shape[0]
        if self._pattern is not None:
            return self._by_pattern(score, _at(score, max(budget(sparsity, d), self._least)))
        if self._selection == "exact":
            count = _at(score, budget(sparsity, d))
            return topk_mask(score, count, backend=_backend_of(score, self._backend))
        removed = int(sparsity * d)
        return score > score.kthvalue(removed).values if removed else torch.ones_like(score, dtype=torch.bool)


def _backend_of(score: Tensor, backend: str | None) -> str | None:
    """Hard votes are fp64, which no other than the reference takes."""
    return "reference" if score.dtype == torch.float64 else backend


def _at(scores: Tensor, count: int) -> Tensor:  # (1,) int64
    """How many to keep, on the device of the scores: from the host it would be waited for."""
    return torch.full((1,), count, dtype=torch.int64, device=scores.device)


def budget(sparsity: float, d: int) -> int:
    """How many of d weights a sparsity keeps: round((1 - sparsity)·d).

    Raises:
        ValueError: none would be kept.
    """
    kept = round((1.0 - sparsity) * d)
    if kept < 1:
        raise ValueError(f"sparsity: wanted one that keeps at least one of {d} weights, got {sparsity!r}")
    return kept

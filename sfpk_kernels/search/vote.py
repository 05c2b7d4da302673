"""The vote: one score per coordinate from all particles, behind the final mask."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import state_checks as check
from .polarizer import Polarizer


class Vote:
    """Running vote of the particles over the coordinates.

    Args:
        polarizer: gives each particle's scores and binary mask.
        kind: score name, see :meth:`Polarizer.score`.
        rule: ``"soft"``: mean score of the voting particles. ``"hard"``: in how many of their binary masks a
            coordinate is kept, equal counts ranked by the soft score. ``"masked"``: the mean of the scores, each
            particle's 0 outside its own best coordinates at the final sparsity (the authors' hard vote).
        ratio: fraction of the particles that vote, those of lowest energy, at least one.
        momentum: after each step, score ← vote + momentum · score.
        sparsity: the final one.
    """

    def __init__(self, polarizer: Polarizer, kind: str, rule: str, ratio: float, momentum: float, sparsity: float):
        self._polarizer = polarizer
        self._kind = kind
        self._rule = rule
        self._ratio = ratio
        self._momentum = momentum
        self._sparsity = sparsity
        self.score: Tensor | None = None  # (d,) as of the last update

    @property
    def remembers(self) -> bool:
        """Whether earlier steps count: without momentum only the last update matters."""
        return self._momentum > 0

    def update(
        self,
        masks: Tensor,  # (n, d) after the move
        densities: Sequence[float],  # one per particle
        energies: Sequence[float],  # likewise, before the move
    ) -> Tensor:  # (d,)
        """Count this step in and return the score; waits for nothing."""
        count = max(1, math.ceil(self._ratio * masks.shape[0] - 1e-9))  # 0.56 · 25 is a little above 14
        rows = sorted(sorted(range(len(energies)), key=lambda i: (math.isnan(energies[i]), energies[i]))[:count])
        if self._rule == "masked":
            vote = self._masked(masks, rows)
        else:
            vote = soft = self._polarizer.mean_score(masks, rows, self._kind)
        if self._rule == "hard":
            kept = self._polarizer.keeps(masks, densities, self._kind, rows)
            fine = soft.double()  # fp32 would lose the order of small scores beside the counts
            low, high = fine.min(), fine.max()
            vote = kept + 0.5 * (fine - low) / (high - low).clamp_min(torch.finfo(fine.dtype).tiny)
        if self._momentum > 0 and self.score is not None:
            vote = vote + self._momentum * self.score
        self.score = vote
        return vote

    def _masked(self, masks: Tensor, rows: list[int]) -> Tensor:
        total = torch.zeros_like(masks[0], dtype=torch.promote_types(masks.dtype, torch.float32))
        for row in rows:
            score = self._polarizer.score(masks[row].to(total.dtype), self._kind)
            total += score * self._polarizer.best(score, self._sparsity)
        return total / len(rows)

    def current(self, masks: Tensor, densities: Sequence[float], energies: Sequence[float]) -> Tensor:
        """The score as it stands: the remembered one, else the vote of these particles alone."""
        if self.remembers and self.score is not None:
            return self.score
        return self.update(masks, densities, energies)

    def state_dict(self, copy: bool = True) -> Tensor | None:
        """The score that later steps add to; the last one where none do."""
        return self.score.clone() if copy and self.remembers and self.score is not None else self.score

    def checked(self, name: str, state: Any, like: Tensor, steps: int, dtypes: Sequence[torch.dtype]) -> Tensor | None:
        """What :meth:`state_dict` gave.

        Args:
            name: in messages.
            state: it.
            like: (d,) on the device of the particles.
            steps: done by the saved run.
            dtypes: that scores may have.

        Raises:
            TypeError, ValueError: something else.
        """
        score = state
        if score is not None:
            score = check.tensor(name, score, tuple(like.shape), *dtypes).to(like.device, copy=True)
        if self.remembers and (score is None) != (steps == 0):
            raise ValueError(f"{name}: wanted one score of all {steps} steps, got {check.got(score)}")
        return score

    def take_over(self, score: Tensor | None) -> None:
        """Go on from what was checked."""
        self.score = score

"""What a run over channels, heads and neurons leaves: which of them stay, and the smaller model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...coordinates.flat import Coordinates
from ...export.measure import Latency
from ...masks.maskset import MaskSet
from ...structure import ShrinkRecipe, Structure
from ...structure.axes import BUDGETS, kept
from ..result import PruneResult
from .coordinates import StructuredCoordinates
from .timing import latency_of
from .words import costs_and_groups, groups_of, outcome

logger = logging.getLogger(__name__)


@dataclass(frozen=True, repr=False)
class StructuredResult(PruneResult):
    """Outcome of a run with another granularity than single weights.

    ``mask`` (and masks on the way) are those of the dense model's weights, False in every row and column that goes;
    ``score`` and ``particles`` are over the C coordinates. Where a LayerNorm or RMSNorm goes over a pruned width, only
    the smaller model has the statistics that the run has seen: :meth:`shrink`.
    """

    keep: Tensor  # (C,) bool, on the CPU
    structure: Structure
    costs_before: dict[str, int]  # params, macs, channels and bytes (of parameters and buffers) of the dense model
    costs_after: dict[str, int]  # of what is kept

    def __repr__(self) -> str:
        left = ", ".join(f"{name} {self.costs_after[name]:,} of {self.costs_before[name]:,}" for name in BUDGETS)
        return f"StructuredResult({left}, {len(self.particles)} particles, {len(self.history)} steps)"

    def __str__(self) -> str:
        """Costs before and after, and what each group keeps, as tables."""
        groups = groups_of(self.structure, self.keep)
        return f"{self!r}\n\n{outcome(self.costs_before, self.costs_after, groups)}"

    def apply_(self, model: nn.Module) -> nn.Module:
        """Apply the mask to ``model``; a warning says which norms see other statistics than in the smaller one."""
        norms = [one.module for one in self.structure.norms if not bool(kept(one.index, self.keep).all())]
        if norms:
            logger.warning(
                "%s: the statistics of zeros are counted in, so outputs differ from those of result.shrink(model)",
                ", ".join(norms),
            )
        return super().apply_(model)

    def keep_at(self, sparsity: float) -> Tensor:  # (C,) bool
        """What :meth:`mask_at` keeps, as coordinates.

        Raises:
            TypeError, ValueError: as there.
        """
        return self._of.keep_of(self.mask_at(sparsity))

    def shrink(self, model: nn.Module, sparsity: float | None = None) -> nn.Module:
        """A smaller deep copy of ``model``, whose outputs are those of the masked one; the model stays as it is.

        Args:
            model: the one that was pruned, or one of the same shapes.
            sparsity: one on the way (:meth:`mask_at`); ``None`` for the run's.

        Raises:
            TypeError, ValueError: another model; a sparsity as in :meth:`mask_at`.
        """
        return self.recipe(sparsity).shrink(model)

    def recipe(self, sparsity: float | None = None) -> ShrinkRecipe:
        """What stays, in plain lists: enough to shrink a fresh copy of the architecture and load weights into it."""
        return ShrinkRecipe.of(self.structure, self.keep if sparsity is None else self.keep_at(sparsity))

    def latency(
        self,
        model: nn.Module,
        example_inputs: Any,
        batches: Sequence[int] = (1, 16),
        *,
        sparsity: float | None = None,
        runs: int = 20,
    ) -> list[Latency]:
        """Measured seconds of a call, dense and shrunk, by turns, on the model's device; for reports, too.

        Args:
            model: the dense one; it stays as it is.
            example_inputs: as for :func:`~sfpk_kernels.prune`; rows along dim 0 are repeated.
            batches: so many rows in a call.
            sparsity: as in :meth:`shrink`.
            runs: calls behind each median, ≥ 1.

        Raises:
            TypeError, ValueError: another model, inputs of another kind, sizes or runs below 1.
        """
        return latency_of(model, self.recipe(sparsity), example_inputs, batches, runs)

    def kept_of_groups(self) -> dict[str, tuple[int, int]]:
        """(kept, all) coordinates of each group."""
        return self.structure.kept_of_groups(self.keep)

    def summary(self) -> Mapping[str, Any]:
        """The outcome in a few plain numbers; sparsity, kept and prunable count weights."""
        more = costs_and_groups(self.costs_before, self.costs_after, self.structure, self.keep)
        return {**super().summary(), **more}

    @property
    def _of(self) -> StructuredCoordinates:
        assert isinstance(self.coordinates, StructuredCoordinates)
        return self.coordinates

    def _select(self, score: Tensor, sparsity: float) -> MaskSet:
        return self._of.masks_of(self.polarizer.final(score.to(self.particles.device), sparsity))


def result_kind(mask: MaskSet, coordinates: Coordinates) -> tuple[type[PruneResult], dict[str, Any]]:
    """The class of a run's result, and what it has beside the fields of all."""
    if not isinstance(coordinates, StructuredCoordinates):
        return PruneResult, {}
    keep, costs = coordinates.keep_of(mask), coordinates.costs
    return StructuredResult, {
        "keep": keep,
        "structure": coordinates.structure,
        "costs_before": costs.whole(),
        "costs_after": costs.left(keep),
    }

"""What a gradual run over channels, heads and neurons leaves: which of them stay, and the smaller model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..coordinates.flat import Coordinates
from ..export.measure import Latency
from ..search.structured.coordinates import StructuredCoordinates
from ..search.structured.timing import latency_of
from ..search.structured.words import costs_and_groups, groups_of, outcome
from ..structure import ShrinkRecipe, Structure
from ..structure.axes import BUDGETS
from ..utils.arguments import check_least
from .shots import GradualResult


@dataclass(frozen=True, repr=False)
class StructuredGradualResult(GradualResult):
    """Outcome of a gradual run with another granularity than single weights; the model holds the retrained weights.

    ``mask`` and ``masks`` are those of the dense model's weights, 0 in every row and column that goes; ``particles``
    are over the C coordinates. Where a LayerNorm or RMSNorm goes over a pruned width, only the smaller model has the
    statistics that it was retrained with: :meth:`shrink`.
    """

    keeps: list[Tensor]  # (C,) bool after every shot, on the CPU
    structure: Structure
    costs_before: dict[str, int]  # params, macs, channels and bytes (of parameters and buffers) of the dense model
    costs: list[dict[str, int]]  # of what is kept after every shot

    def __repr__(self) -> str:
        after = self.costs_after
        left = ", ".join(f"{name} {after[name]:,} of {self.costs_before[name]:,}" for name in BUDGETS)
        return f"StructuredGradualResult({left}, {len(self.history)} shots, {len(self.particles)} particles)"

    def __str__(self) -> str:
        """Costs before and after, and what each group keeps, as tables."""
        groups = groups_of(self.structure, self.keep)
        return f"{self!r}\n\n{outcome(self.costs_before, self.costs_after, groups)}"

    @property
    def keep(self) -> Tensor:  # (C,) bool
        """What stays in the end."""
        return self.keeps[-1]

    @property
    def costs_after(self) -> dict[str, int]:
        """Of what stays in the end."""
        return self.costs[-1]

    def shrink(self, model: nn.Module) -> nn.Module:
        """A smaller deep copy of the retrained model, with the same outputs; the model stays as it is.

        Raises:
            TypeError, ValueError: another model.
        """
        return self.recipe().shrink(model)

    def recipe(self, shot: int | None = None) -> ShrinkRecipe:
        """What stays, in plain lists: enough to shrink a fresh copy of the architecture and load weights into it.

        Args:
            shot: after which; ``None`` for the last. The weights of earlier ones are those that the model had then.

        Raises:
            TypeError, ValueError: no number of a shot.
        """
        if shot is not None:
            check_least("shot", shot, 1)
            if shot > len(self.keeps):
                raise ValueError(f"shot: wanted 1 … {len(self.keeps)} or None, got {shot}")
        return ShrinkRecipe.of(self.structure, self.keeps[-1 if shot is None else shot - 1])

    def kept_of_groups(self) -> dict[str, tuple[int, int]]:
        """(kept, all) coordinates of each group."""
        return self.structure.kept_of_groups(self.keep)

    def latency(
        self, model: nn.Module, example_inputs: Any, batches: Sequence[int] = (1, 16), *, runs: int = 20
    ) -> list[Latency]:
        """Measured seconds of a call, dense and shrunk: as :meth:`sfpk_kernels.StructuredResult.latency`.

        Raises:
            TypeError, ValueError: as there.
        """
        return latency_of(model, self.recipe(), example_inputs, batches, runs)

    def summary(self) -> dict[str, Any]:
        """The outcome in a few plain numbers; sparsity, kept and prunable count weights."""
        more = costs_and_groups(self.costs_before, self.costs_after, self.structure, self.keep)
        return {**super().summary(), **more}


def gradual_result(result: GradualResult, coordinates: Coordinates) -> GradualResult:
    """The result, with all that it has beside where coordinates are no single weights."""
    if not isinstance(coordinates, StructuredCoordinates):
        return result
    keeps = [coordinates.keep_of(masks) for masks in result.masks]
    costs = [coordinates.costs.left(keep) for keep in keeps]
    fields: dict[str, Any] = dict(vars(result))
    return StructuredGradualResult(
        **fields, keeps=keeps, structure=coordinates.structure, costs_before=coordinates.costs.whole(), costs=costs
    )

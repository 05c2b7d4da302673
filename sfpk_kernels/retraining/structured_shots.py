"""What a gradual run over channels, heads and neurons leaves: which of them stay, and the smaller model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..coordinates.flat import Coordinates
from ..search.structured.coordinates import StructuredCoordinates
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
    costs_before: dict[str, int]  # params, macs and channels of the dense model
    costs: list[dict[str, int]]  # of what is kept after every shot

    def __repr__(self) -> str:
        after = self.costs_after
        left = ", ".join(f"{name} {after[name]:,} of {self.costs_before[name]:,}" for name in BUDGETS)
        return f"StructuredGradualResult({left}, {len(self.history)} shots, {len(self.particles)} particles)"

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
        return {group.name: (int(self.keep[group.span].sum()), group.size) for group in self.structure.groups}


def gradual_result(result: GradualResult, coordinates: Coordinates) -> GradualResult:
    """The result, with all that it has beside where coordinates are no single weights."""
    if not isinstance(coordinates, StructuredCoordinates):
        return result
    keeps = [coordinates.keep_of(masks) for masks in result.masks]
    costs = [{name: coordinates.costs.cost(keep, name) for name in BUDGETS} for keep in keeps]
    fields: dict[str, Any] = dict(vars(result))
    return StructuredGradualResult(
        **fields, keeps=keeps, structure=coordinates.structure, costs_before=dict(coordinates.costs.dense), costs=costs
    )

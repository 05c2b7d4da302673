"""What structured baselines share: a structure with its costs, sums over coordinates, the best within a budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..coordinates.flat import Coordinates
from ..search.structured.words import groups_of, outcome
from ..structure import Costs, ShrinkRecipe, Structure, coordinate_sums, find_structure
from ..structure import select as select_coordinates
from ..structure.cost import BUDGETS
from ..structure.find import check_structure_of, split_inputs
from ..structure.limits import limits_of
from ..structure.select import check_ceilings
from ..utils.arguments import check_least, check_model
from ..utils.ranges import check_ranges
from .select import check_sparsity

ALLOCATIONS = ("global", "normalized", "uniform")
_COUNTED = ("gate", "producer")  # weights that read a coordinate, and that compute it; not biases and norms


@dataclass(frozen=True, eq=False)
class StructuredBaseline:
    """What a structured baseline keeps, and what the model costs with it.

    ``dense`` and ``left``: "params", "macs", "channels" and "bytes" of the dense and of the shrunk model, as
    :class:`~sfpk_kernels.structure.Costs` counts them.
    """

    keep: Tensor  # (C,) bool
    structure: Structure
    dense: dict[str, int]
    left: dict[str, int]

    def __str__(self) -> str:
        """Costs before and after, and what each group keeps, as tables."""
        return outcome(self.dense, self.left, groups_of(self.structure, self.keep))

    @property
    def recipe(self) -> ShrinkRecipe:
        """What stays, as plain lists."""
        return ShrinkRecipe.of(self.structure, self.keep)

    def shrink(self, model: nn.Module) -> nn.Module:
        """A smaller deep copy of the model, which is left as it is.

        Raises:
            TypeError, ValueError: as in :func:`~sfpk_kernels.structure.shrink`.
        """
        return self.recipe.shrink(model)

    def kept_of_groups(self) -> dict[str, tuple[int, int]]:
        """(kept, all) coordinates of each group."""
        return self.structure.kept_of_groups(self.keep)


class StructuredProblem:
    """A model's structure and costs, and what is wanted of them; all arguments are looked at before anything runs."""

    def __init__(
        self,
        model: nn.Module,
        sparsity: float,
        example_inputs: Any,
        allocation: str,
        budget: str,
        options: dict[str, Any],
    ):
        check_model(model)
        check_sparsity(sparsity)
        if allocation not in ALLOCATIONS:
            raise ValueError(f"allocation: wanted one of {', '.join(ALLOCATIONS)}, got {allocation!r}")
        if budget not in BUDGETS:
            raise ValueError(f"budget: wanted one of {', '.join(BUDGETS)}, got {budget!r}")
        options = dict(options)
        self._floors = {name: options.pop(name, 1) for name in ("min_keep", "round_to")}
        for name, value in self._floors.items():
            check_least(name, value, 1)
        self._floors["layer_sparsity"] = check_ranges("layer_sparsity", options.pop("layer_sparsity", None))
        args, kwargs = split_inputs(example_inputs)
        structure = options.pop("structure", None)
        if structure is None:
            structure = find_structure(model, example_inputs, **options)
        else:
            if options:
                raise TypeError(f"{sorted(options)[0]}: wanted only without structure=, which was found already")
            check_structure_of(model, structure)
        self._model, self._sparsity, self._allocation, self._budget = model, sparsity, allocation, budget
        self.structure: Structure = structure
        self.costs = Costs(model, structure, args, kwargs)
        limits = limits_of(structure, **self._floors)
        if self._floors["layer_sparsity"] is not None:
            check_ceilings(structure, self.costs, sparsity, budget, limits, self._floors["layer_sparsity"])

    def coordinates(self) -> Coordinates:
        """Single weights, those among them that belong to a coordinate of the structure."""
        found = Coordinates(self._model, include_embeddings=True)
        known = {name for tensor in found.tensors for name in (tensor.name, *tensor.aliases)}
        lost = [e.tensor for e in self.structure.entries if e.role in _COUNTED and e.tensor not in known]
        if lost:
            raise ValueError(f"model: wanted weights of layers that a score is defined for, got {lost[0]}")
        return found

    def sums(
        self,
        coordinates: Coordinates,
        values: Tensor,  # (d,)
        roles: tuple[str, ...] = _COUNTED,
    ) -> Tensor:  # (C,) fp64, on the CPU
        """Σ over the weights that each coordinate governs."""
        parts = zip(coordinates.tensors, coordinates.split(values.double()), strict=True)
        by_name = {name: part for tensor, part in parts for name in (tensor.name, *tensor.aliases)}
        return coordinate_sums(self.structure, by_name, roles).cpu()

    def solved(self, score: Tensor) -> StructuredBaseline:  # (C,)
        """The best coordinates within the budget."""
        score = allocated(self.structure, score, self._allocation)
        keep = select_coordinates(self.structure, self.costs, score, self._sparsity, self._budget, **self._floors)
        return StructuredBaseline(keep, self.structure, self.costs.whole(), self.costs.left(keep))


def allocated(
    structure: Structure,
    score: Tensor,  # (C,) ≥ 0
    allocation: str,
) -> Tensor:  # (C,) fp64
    """Scores that are compared over all groups: as they are, over the mean of their group, or their rank in it."""
    score = score.double()
    if allocation == "global":
        return score
    found = torch.empty_like(score)
    for group in structure.groups:
        part = score[group.span]
        if allocation == "normalized":
            mean = part.mean()
            found[group.span] = part / mean if mean > 0 else part
        else:
            rank = torch.empty_like(part)
            rank[part.argsort(descending=True, stable=True)] = torch.arange(group.size, dtype=rank.dtype, device="cpu")
            found[group.span] = 1 - (rank + 0.5) / group.size
    return found

"""The best coordinates that a budget allows."""

from __future__ import annotations

import torch
from torch import Tensor

from ..utils.arguments import check_least
from .axes import BUDGETS, CoordinateGroup, Structure
from .cost import Costs


def select(
    structure: Structure,
    costs: Costs,
    score: Tensor,  # (C,)
    sparsity: float,
    budget: str = "macs",
    *,
    min_keep: int = 1,
    round_to: int = 1,
) -> Tensor:  # (C,) bool
    """The coordinates of highest score whose cost is at most ``(1 − sparsity)`` of the dense one.

    The rank down to which coordinates are kept is bisected, as costs are products of how many are kept; what room is
    left is filled in the order of the scores. Ties go to the lower coordinate. No layer is left without any input or
    output.

    Args:
        structure: the coordinates.
        costs: of the same model.
        score: higher is better; all finite.
        sparsity: the fraction of the cost to remove.
        budget: "params", "macs" or "channels".
        min_keep: at least so many of every group stay, or all of a smaller one.
        round_to: groups keep a multiple of it, or all.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: one out of its range; a budget that even the fewest coordinates exceed.
    """
    check_least("min_keep", min_keep, 1)
    check_least("round_to", round_to, 1)
    if budget not in BUDGETS:
        raise ValueError(f"budget: wanted one of {BUDGETS}, got {budget!r}")
    if not isinstance(sparsity, int | float) or not 0 <= sparsity < 1:
        raise ValueError(f"sparsity: wanted a number from 0 up to, but not including, 1, got {sparsity!r}")
    if not isinstance(score, Tensor) or score.shape != (structure.size,):
        got = tuple(score.shape) if isinstance(score, Tensor) else type(score).__name__
        raise ValueError(f"score: wanted a tensor of shape ({structure.size},), got {got}")
    score = score.detach().cpu().double()
    if not bool(score.isfinite().all()):
        raise ValueError("score: wanted finite values, got NaN or infinite ones")
    limit = round((1 - sparsity) * costs.dense[budget])
    ranking = _Ranking(structure, score, min_keep, round_to)
    least = costs.cost(ranking.keep(0), budget)
    if least > limit:
        raise ValueError(
            f"sparsity: wanted at most {1 - least / costs.dense[budget]:.4f} of the {budget}, which leaves "
            f"min_keep={min_keep} of every group and no layer dead, got {sparsity}"
        )
    return _within(ranking, costs, budget, limit)


def select_within(
    structure: Structure,
    costs: Costs,
    score: Tensor,  # (C,)
    limit: int,
    budget: str,
    min_keep: int = 1,
    round_to: int = 1,
) -> Tensor:  # (C,) bool
    """:func:`select` for a cost, unchecked; the fewest coordinates that may stay where even they cost more."""
    return _within(_Ranking(structure, score.detach().cpu().double(), min_keep, round_to), costs, budget, limit)


def _within(ranking: _Ranking, costs: Costs, budget: str, limit: int) -> Tensor:
    low, high = 0, ranking.structure.size
    while low < high:
        middle = (low + high + 1) // 2
        if costs.cost(ranking.keep(middle), budget) <= limit:
            low = middle
        else:
            high = middle - 1
    return _filled(ranking, costs, ranking.keep(low), budget, limit)


class _Ranking:
    """Coordinates from the best to the worst, what must stay first."""

    def __init__(self, structure: Structure, score: Tensor, min_keep: int, round_to: int):
        self.structure, self.round_to = structure, round_to
        self.order = score.argsort(descending=True, stable=True)
        self.place = torch.empty_like(self.order)
        self.place[self.order] = torch.arange(structure.size, dtype=torch.int64, device="cpu")
        self.by_group = [
            self._sorted(torch.arange(g.first, g.first + g.size, dtype=torch.int64, device="cpu"))
            for g in structure.groups
        ]
        self.floor = torch.zeros(structure.size, dtype=torch.bool, device="cpu")
        for best in self.by_group:
            self.floor[best[:min_keep]] = True
        for layer in structure.layers:
            if not bool(self.floor[layer].any()):
                self.floor[self._sorted(layer)[0]] = True

    def _sorted(self, coordinates: Tensor) -> Tensor:
        return coordinates[self.place[coordinates].argsort()]

    def keep(self, rank: int) -> Tensor:  # (C,) bool
        """The floor and the best ``rank``, groups filled up to what they may keep: more with every rank."""
        keep = self.floor.clone()
        keep[self.order[:rank]] = True
        if self.round_to > 1:
            for group, best in zip(self.structure.groups, self.by_group, strict=True):
                add_best(keep, best, self.allowed(group, int(keep[group.span].sum())))
        return keep

    def allowed(self, group: CoordinateGroup, count: int) -> int:
        """The least number that a group may keep and is no smaller."""
        return min(-(-count // self.round_to) * self.round_to, group.size)


def add_best(keep: Tensor, best: Tensor, count: int) -> None:
    """Keep more of a group, from the best on, until there are ``count``."""
    missing = best[~keep[best]]
    keep[missing[: count - (len(best) - len(missing))]] = True


def _filled(ranking: _Ranking, costs: Costs, keep: Tensor, budget: str, limit: int) -> Tensor:
    """More of the best coordinates, as long as they fit; what does not fit now never will."""
    alike = costs.alike
    closed: set[int] = set()
    for coordinate in ranking.order.tolist():
        if bool(keep[coordinate]) or int(alike[coordinate]) in closed:
            continue
        group = ranking.structure.group_of(coordinate)
        more = keep.clone()
        more[coordinate] = True
        best = ranking.by_group[ranking.structure.groups.index(group)]
        add_best(more, best, ranking.allowed(group, int(more[group.span].sum())))
        if costs.cost(more, budget) <= limit:
            keep = more
        else:
            closed.add(int(alike[coordinate]))
    return keep

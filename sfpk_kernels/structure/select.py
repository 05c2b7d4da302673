"""The best coordinates that a budget allows."""

from __future__ import annotations

import torch
from torch import Tensor

from .axes import BUDGETS, Structure
from .cost import Costs
from .limits import Limits, Ranges, limits_of


def select(
    structure: Structure,
    costs: Costs,
    score: Tensor,  # (C,)
    sparsity: float,
    budget: str = "macs",
    *,
    min_keep: int = 1,
    round_to: int = 1,
    layer_sparsity: Ranges | None = None,
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
        layer_sparsity: sparsity (low, high), in coordinates, of the groups that a name matches: of a module, of one
            that it is in, or ``"re:…"``.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: one out of its range; a name that matches no group; a range that a group cannot have; a budget that
            even the fewest coordinates exceed.
    """
    limits = limits_of(structure, min_keep, round_to, layer_sparsity)
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
    ranking = _Ranking(structure, score, limits)
    least = costs.cost(ranking.keep(0), budget)
    if least > limit:
        raise ValueError(
            f"sparsity: wanted at most {1 - least / costs.dense[budget]:.4f} of the {budget}, which leaves "
            f"min_keep={min_keep} of every group and no layer dead{_also(layer_sparsity)}, got {sparsity}"
        )
    return _within(ranking, costs, budget, limit)


def select_within(
    structure: Structure,
    costs: Costs,
    score: Tensor,  # (C,)
    limit: int,
    budget: str,
    limits: Limits,
) -> Tensor:  # (C,) bool
    """:func:`select` for a cost, unchecked; the fewest coordinates that may stay where even they cost more."""
    return _within(_Ranking(structure, score.detach().cpu().double(), limits), costs, budget, limit)


def check_ceilings(
    structure: Structure,
    costs: Costs,
    sparsity: float,
    budget: str,
    limits: Limits,
    layer_sparsity: Ranges | None,
) -> None:
    """That layers may keep enough for the budget, but for what rounding to whole coordinates takes.

    Raises:
        ValueError: they may not; the message says what sparsity they demand.
    """
    limits = limits.loosened(structure)
    score = torch.zeros(structure.size, dtype=torch.float64, device="cpu")
    most = costs.cost(_Ranking(structure, score, limits).keep(structure.size), budget)
    if most < round((1 - sparsity) * costs.dense[budget]):
        raise ValueError(
            f"sparsity: wanted at least {1 - most / costs.dense[budget]:.4f} of the {budget}, which "
            f"layer_sparsity={dict(layer_sparsity or {})} demands, got {sparsity}"
        )


def _also(layer_sparsity: Ranges | None) -> str:
    return f", with layer_sparsity={dict(layer_sparsity)}" if layer_sparsity else ""


def _within(ranking: _Ranking, costs: Costs, budget: str, limit: int) -> Tensor:
    low, high = 0, len(ranking.order)
    while low < high:
        middle = (low + high + 1) // 2
        if costs.cost(ranking.keep(middle), budget) <= limit:
            low = middle
        else:
            high = middle - 1
    return _filled(ranking, costs, ranking.keep(low), budget, limit)


class _Ranking:
    """Coordinates that may stay, from the best to the worst, what must stay first."""

    def __init__(self, structure: Structure, score: Tensor, limits: Limits):
        self.structure, self.limits = structure, limits
        order = score.argsort(descending=True, stable=True)
        self._place = torch.empty_like(order)
        self._place[order] = torch.arange(structure.size, dtype=torch.int64, device="cpu")
        self.by_group = [
            self._sorted(torch.arange(g.first, g.first + g.size, dtype=torch.int64, device="cpu"))
            for g in structure.groups
        ]
        self.floor = torch.zeros(structure.size, dtype=torch.bool, device="cpu")
        for best, least in zip(self.by_group, limits.least, strict=True):
            self.floor[best[:least]] = True
        for layer in structure.layers:
            if not bool(self.floor[layer].any()):
                self.floor[self._sorted(layer)[0]] = True
        # What lies above the ceilings is in no ranking.
        self.by_group = [self._below(best, most) for best, most in zip(self.by_group, limits.most, strict=True)]
        may_stay = torch.zeros(structure.size, dtype=torch.bool, device="cpu")
        may_stay[torch.cat(self.by_group)] = True
        self.order = order[may_stay[order]]

    def _sorted(self, coordinates: Tensor) -> Tensor:
        return coordinates[self._place[coordinates].argsort()]

    def _below(self, best: Tensor, most: int) -> Tensor:
        """The floor of a group and its best others, so many in all."""
        if most == len(best):
            return best
        for coordinate in best.flip(0).tolist():
            if int(self.floor[best].sum()) <= most:
                break
            # Some were added for the sake of layers, which others may keep alive as well.
            self.floor[coordinate] = False
            if not all(bool(self.floor[layer].any()) for layer in self.structure.layers):
                self.floor[coordinate] = True
        others = best[~self.floor[best]][: most - int(self.floor[best].sum())]
        return self._sorted(torch.cat([best[self.floor[best]], others]))

    def keep(self, rank: int) -> Tensor:  # (C,) bool
        """The floor and the best ``rank``, groups filled up to what they may keep: more with every rank."""
        keep = self.floor.clone()
        keep[self.order[:rank]] = True
        if self.limits.round_to > 1:
            for number, group in enumerate(self.structure.groups):
                self.fill(keep, number, int(keep[group.span].sum()))
        return keep

    def fill(self, keep: Tensor, number: int, count: int) -> None:
        """Keep more of a group, up to what it may keep and is no less than ``count``."""
        add_best(keep, self.by_group[number], self.limits.allowed(number, count))


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
        ranking.fill(more, ranking.structure.groups.index(group), int(more[group.span].sum()))
        if costs.cost(more, budget) <= limit:
            keep = more
        else:
            closed.add(int(alike[coordinate]))
    return keep

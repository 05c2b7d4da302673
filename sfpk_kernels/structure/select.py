"""The best coordinates that a budget allows."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ._ranking import Bools, Ranking
from .axes import BUDGETS, Structure
from .cost import Costs
from .limits import Limits, Ranges, limits_of

_RANK_0 = np.zeros(1, dtype=np.int64)
_PROBES, _LENGTHS = 256, 8192  # ranks that are tried at once, at most, and with them lengths of dims
_COUNT = np.arange(_PROBES + 1, dtype=np.int64)
_AHEAD, _MOST_AHEAD = 64, 1024  # coordinates that are tried at once, one after the other


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

    The rank down to which coordinates are kept is searched, as costs are products of how many are kept; what room is
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
    ranking = Ranking(structure, costs.counting, score, limits)
    least = int(costs.counting.costs(ranking.counts(_RANK_0), budget)[0])
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
    return _within(Ranking(structure, costs.counting, score.detach().cpu().double(), limits), costs, budget, limit)


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
    ranking = Ranking(structure, costs.counting, score, limits)
    most = int(costs.counting.costs(ranking.count(ranking.keep(len(ranking.free)))[None], budget)[0])
    if most < round((1 - sparsity) * costs.dense[budget]):
        raise ValueError(
            f"sparsity: wanted at least {1 - most / costs.dense[budget]:.4f} of the {budget}, which "
            f"layer_sparsity={dict(layer_sparsity or {})} demands, got {sparsity}"
        )


def _also(layer_sparsity: Ranges | None) -> str:
    return f", with layer_sparsity={dict(layer_sparsity)}" if layer_sparsity else ""


def _within(ranking: Ranking, costs: Costs, budget: str, limit: int) -> Tensor:
    keep = ranking.keep(_last_rank(ranking, budget, limit))
    return torch.from_numpy(_filled(ranking, keep, budget, limit))


def _last_rank(ranking: Ranking, budget: str, limit: int) -> int:
    """The last rank that costs no more than the limit, or 0; costs grow with the rank."""
    low, high = 0, len(ranking.free)
    most = min(max(_LENGTHS // len(ranking.counting.always), 32), _PROBES)
    while low < high:
        steps = min(most, high - low)
        probes = low + (high - low) * _COUNT[1 : steps + 1] // steps
        fit = int(_leading(ranking.counting.costs(ranking.counts(probes), budget) <= limit))
        low, high = (int(probes[fit - 1]) if fit else low), (int(probes[fit]) - 1 if fit < len(probes) else high)
    return low


def _filled(ranking: Ranking, keep: Bools, budget: str, limit: int) -> Bools:
    """More of the best coordinates, as long as they fit; what does not fit now never will."""
    counting = ranking.counting
    counts, ahead = ranking.count(keep), _AHEAD
    shut = np.zeros(int(counting.alike.max()) + 1, dtype=np.bool_)  # by the number of those that are alike
    while True:
        more, known = ranking.one_more(counts)
        late = known & (counting.costs(counts + np.diag(more), budget) > limit)
        shut[counting.alike[late]] = True
        open_ = ~(keep | shut[counting.numbers])
        left = ranking.order[open_[ranking.order]]
        if not len(left):
            return keep
        if ranking.round_to == 1:
            tried = left[:ahead]
            added = np.zeros((len(tried), counting.classes), dtype=np.int64)
            added[np.arange(len(tried)), counting.of[tried]] = 1
            rows = counts + added.cumsum(0)
            fit = _leading(counting.costs(rows, budget) <= limit)
            keep[tried[:fit]] = True
            ahead = min(4 * ahead, _MOST_AHEAD) if fit == len(tried) else _AHEAD
        else:
            tried = left[:1]
            wider = ranking.with_one(keep, int(tried[0]))
            rows = ranking.count(wider)[None]
            fit = _leading(counting.costs(rows, budget) <= limit)
            keep = wider if fit else keep
        counts = rows[fit - 1] if fit else counts
        if fit < len(tried):
            shut[counting.numbers[tried[fit]]] = True


def _leading(fits: Bools) -> int:
    """How many are true before the first that is not."""
    return len(fits) if fits.all() else int(fits.argmin())

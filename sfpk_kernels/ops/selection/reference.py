"""Exact selection in plain PyTorch, by a stable sort: the ground truth every other backend is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from ..bits.reference import pack_mask
from ._arguments import Cut
from ._selection import Selection, nan_error, remaining

_INF = float("inf")


def select(selection: Selection) -> tuple[Cut, list[Tensor]]:
    """The cuts, and one mask per tensor of ``values`` unless only the cut is asked for."""
    scores = score_rows(selection)
    _check_nan(selection, scores)
    excluded = selection.set_aside()
    if selection.pattern is not None:
        excluded = _split(selection, _leave_out_by_pattern(selection, scores))
    counts, limits = remaining(selection, excluded)
    out_of_ranking = _joined(selection, excluded, scores)
    sizes = _joined(selection, selection.sizes, scores) if selection.sizes else None
    masks = _joined(selection, selection.protected, scores)
    cut = Cut(
        scores.new_empty(limits.shape[1:]), torch.empty(limits.shape[1:], dtype=torch.int64, device=scores.device)
    )
    for row, k in enumerate(counts):
        order = scores[row].sort(descending=True, stable=True).indices
        order = order[~out_of_ranking[row][order]]
        if sizes is not None:
            kept = order[sizes[row][order].cumsum(0) <= k]
        else:
            kept = order[_within_limits(selection, order, k, limits[:, row].to(order.device))]
        chosen = torch.zeros_like(out_of_ranking[row])
        chosen[kept] = True
        masks[row] |= chosen
        for s, (begin, end) in enumerate(zip(selection.segments, selection.segments[1:], strict=False)):
            cut.threshold[row, s], cut.tie_end[row, s] = _describe(
                scores[row], chosen, ~out_of_ranking[row], begin, end
            )
    if selection.output == "cut":
        return cut, []
    return cut, [pack_mask(mask.clone(), selection.output) for mask in _split(selection, masks)]


def score_rows(selection: Selection) -> Tensor:  # (rows, d) fp32, fp64 for fp64 values
    """The scores, rounded as every backend rounds them; +0 for both zeros."""
    dtype = torch.float64 if selection.values[0].dtype == torch.float64 else torch.float32
    if selection.by_rows:
        values = selection.values[0].to(dtype)
        saliency = selection.saliency[0].to(dtype) if selection.saliency else None
    else:
        values = torch.cat([t.flatten() for t in selection.values]).to(dtype)[None]
        saliency = torch.cat([t.flatten() for t in selection.saliency]).to(dtype) if selection.saliency else None
    if selection.score != "mean_abs_saliency":
        return score_of(values, selection.score, saliency)
    assert saliency is not None
    total = values[0].abs()
    for row in values[1:]:
        total = total + row.abs()
    scale = torch.ones((), dtype=dtype, device=values.device) / values.shape[0]
    return (total * saliency * scale + 0.0)[None]


def score_of(
    values: Tensor,  # (n, d)
    score: str,
    saliency: Tensor | None,  # (d,)
) -> Tensor:  # (n, d) fp32, fp64 for fp64 values
    """Scores of single entries: ``"value"``, ``"abs"``, ``"abs_saliency"`` or ``"value_saliency"``."""
    wide = values.to(torch.float64 if values.dtype == torch.float64 else torch.float32)
    if score.startswith("abs"):
        wide = wide.abs()
    return (wide if saliency is None else wide * saliency.to(wide.dtype)) + 0.0


def _check_nan(selection: Selection, scores: Tensor) -> None:
    nan = torch.isnan(scores)
    if not nan.any():
        return
    if selection.by_rows:
        raise nan_error(selection, int(nan.any(dim=1).int().argmax()))
    lengths = [t.numel() for t in selection.values]
    raise nan_error(selection, next(i for i, part in enumerate(nan[0].split(lengths)) if part.any()))


def _joined(selection: Selection, tensors: list[Tensor], scores: Tensor) -> Tensor:
    """Companions as one (rows, d) tensor; False where there are none."""
    if not tensors:
        return torch.zeros_like(scores, dtype=torch.bool)
    flat = tensors[0] if selection.by_rows else torch.cat([t.flatten() for t in tensors])
    return flat.expand(scores.shape).clone()


def _split(selection: Selection, rows: Tensor) -> list[Tensor]:
    """(rows, d) in the shapes of the values."""
    if selection.by_rows:
        return [rows]
    parts = rows[0].split([t.numel() for t in selection.values])
    return [part.reshape(t.shape) for part, t in zip(parts, selection.values, strict=True)]


def _leave_out_by_pattern(selection: Selection, scores: Tensor) -> Tensor:  # (rows, d) bool
    """All but the best N of each group of M; protected entries take their places first, removed ones never."""
    assert selection.pattern is not None
    keep, group = selection.pattern
    protected = _joined(selection, selection.protected, scores).reshape(-1, group)
    aside = _joined(selection, selection.set_aside(), scores).reshape(-1, group)
    order = scores.reshape(-1, group).sort(dim=1, descending=True, stable=True).indices
    places = keep - protected.sum(dim=1, keepdim=True)
    candidate = ~aside.gather(1, order)
    best = candidate & (candidate.cumsum(dim=1) <= places)
    return torch.ones_like(aside).scatter(1, order, ~best).reshape(scores.shape)


def _within_limits(
    selection: Selection,
    order: Tensor,  # candidates, best first
    k: int,
    limits: Tensor,  # (3, S)
) -> Tensor:  # bool, which of them are kept
    """Every segment's floor first, then the best of the others below their segment's ceiling."""
    if limits.shape[1] == 1:
        return torch.arange(order.numel(), dtype=torch.int64, device=order.device) < k
    borders = torch.tensor(selection.segments[1:-1], dtype=torch.int64, device=order.device)
    segment = torch.bucketize(order, borders, right=True)
    rank = torch.empty_like(order)
    for s in range(limits.shape[1]):
        members = segment == s
        rank[members] = torch.arange(int(members.sum()), dtype=torch.int64, device=order.device)
    demanded = rank < limits[0][segment]
    allowed = ~demanded & (rank < limits[1][segment])
    return demanded | (allowed & (allowed.cumsum(0) <= k - demanded.sum()))


def _describe(scores: Tensor, kept: Tensor, free: Tensor, begin: int, end: int) -> tuple[float, int]:
    """Threshold and tie end of one segment of one row."""
    kept, free, scores, d = kept[begin:end], free[begin:end], scores[begin:end], scores.shape[0]
    if not kept.any():
        return _INF, 0
    if torch.equal(kept, free):
        return -_INF, d
    threshold = scores[kept].min()
    ties = free & (scores == threshold)
    kept_ties = (ties & kept).nonzero()
    return float(threshold), d if kept_ties.numel() == ties.sum() else begin + int(kept_ties[-1]) + 1

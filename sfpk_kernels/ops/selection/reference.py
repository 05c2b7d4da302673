"""Exact top-k masks in plain PyTorch: the ground truth every other backend is compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def topk_mask(
    scores: Tensor,  # (rows, d) float, no NaN
    counts: list[int],  # (rows,) 0 ≤ k ≤ d
) -> Tensor:  # (rows, d) bool
    """Row by row: everything above the k-th largest score, and of its equals the first ones by index."""
    masks = torch.zeros_like(scores, dtype=torch.bool)
    for mask, row, k in zip(masks, scores, counts, strict=True):
        if k == 0:
            continue
        values = row if row.dtype == torch.float64 else row.float()
        threshold = values.kthvalue(values.numel() - k + 1).values
        above = values > threshold
        equal = values == threshold
        open_places = k - above.sum()
        mask.copy_(above | (equal & (equal.cumsum(0) <= open_places)))
    return masks

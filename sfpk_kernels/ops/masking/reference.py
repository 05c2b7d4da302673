"""Masked weights in plain PyTorch: the ground truth every other backend is compared with."""

from __future__ import annotations

from torch import Tensor


def masked_weights_(
    weights: Tensor,  # (d,)
    mask: Tensor,  # (d,) or (n, d), bool or float
    out: Tensor,  # the shape of mask, written
) -> None:
    """``out ← weights ⊙ mask``. Removed entries are exactly 0, whatever the weight (inf and NaN too)."""
    if mask.is_floating_point():
        out.copy_(weights * mask)
    else:
        out.copy_(weights.expand_as(mask).masked_fill(~mask, 0))

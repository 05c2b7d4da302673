"""Masked weights in plain PyTorch: the ground truth every other backend is compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..bits import reference as bits
from ..layout import Piece
from ..selection.reference import score_of
from ._arguments import Mask


def masked_weights_(
    weights: Sequence[Tensor],  # per piece (numel,)
    mask: Mask,  # n rows
    pieces: Sequence[Piece],
    outs: Sequence[Tensor],  # per piece (n, numel), written
) -> None:
    """``out ← weights ⊙ mask``. Removed entries are exactly 0, whatever the weight (inf and NaN too)."""
    keep = kept(mask)
    for weight, piece, out in zip(weights, pieces, outs, strict=True):
        factors = spread(keep[:, piece.coordinates], piece)
        if mask.multiplies:
            wide = torch.promote_types(torch.promote_types(weight.dtype, keep.dtype), torch.float32)
            out.copy_(weight.to(wide) * factors.to(wide))
        else:
            out.copy_(weight.expand_as(factors).masked_fill(~factors, 0))


def kept(mask: Mask) -> Tensor:  # (n, d) bool, or the factors
    """The mask as bools; a NaN score is not kept."""
    if mask.values.dtype in (torch.uint8, torch.int32):
        return bits.unpack_mask(mask.values, mask.d)
    if mask.threshold is None or mask.tie_end is None:
        return mask.values
    scores = score_of(mask.values, mask.score, mask.saliency)
    lengths = torch.tensor(mask.segments, dtype=torch.int64, device=scores.device).diff()
    threshold = mask.threshold.to(scores.dtype).repeat_interleave(lengths, dim=1, output_size=mask.d)
    tie_end = mask.tie_end.repeat_interleave(lengths, dim=1, output_size=mask.d)
    index = torch.arange(mask.d, dtype=torch.int64, device=scores.device)
    return (scores > threshold) | ((scores == threshold) & (index < tie_end))


def spread(
    coordinates: Tensor,  # (n, groups)
    piece: Piece,
) -> Tensor:  # (n, numel)
    """Each coordinate's value at every weight it governs."""
    n = coordinates.shape[0]
    blocks = coordinates.view(n, 1, piece.groups, 1).expand(n, piece.outer, piece.groups, piece.inner)
    return blocks.reshape(n, piece.numel)


def mask_gradient_(
    weights: Sequence[Tensor],  # per piece (numel,)
    grads: Sequence[Tensor],  # per piece (n, numel)
    pieces: Sequence[Piece],
    out: Tensor,  # (n, d): fp32 is written where a piece governs, and no two may share a coordinate; fp64 added to
) -> None:
    """``out_e ← Σ_{w in e} θ_w · g_w``: products rounded to fp32 (fp64 where a factor is), sums in fp64."""
    for weight, grad, piece in zip(weights, grads, pieces, strict=True):
        wide = torch.promote_types(torch.promote_types(weight.dtype, grad.dtype), torch.float32)
        products = weight.to(wide) * grad.to(wide)
        if not piece.single:
            blocks = products.view(products.shape[0], piece.outer, piece.groups, piece.inner)
            products = blocks.sum(dim=(1, 3), dtype=torch.float64)
        if out.dtype == torch.float64:
            out[:, piece.coordinates] += products
        else:
            out[:, piece.coordinates] = products

"""Packed masks in plain PyTorch: the ground truth every other backend is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from ..packing import mask_shape


def pack_mask(
    mask: Tensor,  # (…, d) bool
    kind: str,
) -> Tensor:
    """Bit e of the last dimension to bit e % 8 of byte e // 8, the same in words of 32 bits; zeros behind."""
    if kind == "bool":
        return mask
    shape, dtype = mask_shape(tuple(mask.shape), kind)
    mask = mask.reshape(mask.shape or (1,))
    bits = shape[-1] * (32 if kind == "int32" else 8)
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, bits - mask.shape[-1]))
    bit = torch.arange(8, dtype=torch.uint8, device=mask.device)  # made there: nothing is copied to a GPU
    octets = (padded.reshape(*shape[:-1], bits // 8, 8) << bit).sum(dim=-1).to(torch.uint8)
    return octets.flatten().view(dtype).reshape(shape)


def unpack_mask(
    packed: Tensor,  # (…, units)
    d: int,
) -> Tensor:  # (…, d) bool
    """What :func:`pack_mask` was given."""
    # A copy: a mask of one unit is contiguous with any stride, but bytes can be seen only in stride 1.
    octets = torch.empty(packed.shape, dtype=packed.dtype, device=packed.device).copy_(packed).view(torch.uint8)
    bit = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (octets[..., None] >> bit) & 1
    return bits.flatten(-2)[..., :d].bool()


def popcount(
    packed: Tensor,  # (…, units)
) -> Tensor:  # (…) int64
    """Set bits along the last dimension."""
    return unpack_mask(packed, packed.shape[-1] * packed.element_size() * 8).sum(dim=-1)


def overlaps(
    a: Tensor,  # (n, units)
    b: Tensor,  # (m, units)
) -> Tensor:  # (n, m) int64
    """How many bits are set in both, for every pair of rows."""
    return torch.stack([popcount(row & b) for row in a]) if a.shape[0] else a.new_empty(0, b.shape[0]).long()

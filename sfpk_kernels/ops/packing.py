"""Shapes of packed masks: one bit per coordinate, along the last dimension."""

from __future__ import annotations

import torch

PACKED = ("uint8", "int32")
BITS = {torch.uint8: 8, torch.int32: 32}


def mask_shape(shape: tuple[int, ...], kind: str) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of the mask of one tensor: ``"bool"``, or packed ``"uint8"`` or ``"int32"``."""
    if kind == "bool":
        return shape, torch.bool
    dtype = torch.int32 if kind == "int32" else torch.uint8
    *outer, last = shape or (1,)
    return (*outer, units(dtype, last)), dtype


def units(dtype: torch.dtype, d: int) -> int:
    """Entries along the last dimension of a mask of this dtype for d coordinates; d itself where nothing is packed."""
    return -(-d // BITS.get(dtype, 1))

"""Huge tensors of which only what is touched takes memory."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

_NO_RESERVE = 0x4000  # MAP_NORESERVE: pages are there when they are touched, zeros before


def sparse(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros that take no memory until they are written."""
    count = 1
    for size in shape:
        count *= size
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
    buffer = mmap.mmap(-1, count * dtype.itemsize + mmap.PAGESIZE, flags=flags)
    return torch.frombuffer(buffer, dtype=dtype, count=count).view(shape)

"""Packed masks in C++ (csrc/cpu/bits.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _extension
from ..packing import mask_shape


def why_not(tensor: Tensor) -> str | None:
    """Why the kernels cannot run on this tensor."""
    if tensor.device.type != "cpu":
        return f"it runs on the CPU, the tensor is on {tensor.device}"
    return _extension.unavailable()


def pack_mask(mask: Tensor, kind: str) -> Tensor:
    """As :func:`.reference.pack_mask`."""
    shape, dtype = mask_shape(tuple(mask.shape), kind)
    out = torch.empty(shape, dtype=dtype, device=mask.device)
    torch.ops.sfpk_cpp.pack_(mask.contiguous(), out)
    return out


def unpack_mask(packed: Tensor, d: int) -> Tensor:
    """As :func:`.reference.unpack_mask`."""
    out = torch.empty((*packed.shape[:-1], d), dtype=torch.bool, device=packed.device)
    torch.ops.sfpk_cpp.unpack_(packed.contiguous(), out)
    return out


def popcount(packed: Tensor) -> Tensor:
    """As :func:`.reference.popcount`."""
    rows = packed.reshape(packed.shape[:-1].numel(), packed.shape[-1])
    out = torch.empty(rows.shape[0], dtype=torch.int64, device=packed.device)
    torch.ops.sfpk_cpp.popcount_(rows.contiguous(), out)
    return out.view(packed.shape[:-1])


def overlaps(a: Tensor, b: Tensor) -> Tensor:
    """As :func:`.reference.overlaps`."""
    out = torch.empty((a.shape[0], b.shape[0]), dtype=torch.int64, device=a.device)
    torch.ops.sfpk_cpp.overlaps_(a.contiguous(), b.contiguous(), out)
    return out

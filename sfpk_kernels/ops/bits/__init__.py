"""Bit-packed masks: ``pack_mask``, ``unpack_mask``, ``popcount``, ``mask_iou``, ``mask_hamming``.

One bit per coordinate, little-endian along the last dimension: coordinate e is bit e % 8 of byte e // 8, in int32
masks bit e % 32 of word e // 32; the bits behind the last coordinate are zero. A mask of d coordinates takes d / 8
bytes (NumPy's ``packbits(…, bitorder="little")``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._dispatch import Backend, choose
from .. import _checks as check
from .. import _transforms as transforms
from .._named import register
from ..packing import BITS, PACKED, mask_shape, units
from . import cpp, reference

__all__ = ["BACKENDS", "mask_hamming", "mask_iou", "pack_mask", "popcount", "unpack_mask"]

_DTYPES = tuple(BITS)


def pack_mask(
    mask: Tensor,  # (…, d) bool
    kind: str = "uint8",
    *,
    backend: str | None = None,
) -> Tensor:  # (…, ceil(d / 8)) uint8, (…, ceil(d / 32)) int32
    """A bool mask as bits along its last dimension.

    Args:
        mask: bool, of any shape.
        kind: ``"uint8"`` or ``"int32"``.
        backend: ``None`` for the fastest available.

    To ``torch.export`` with a dynamic d, one unit is a size of its own: let d begin behind it (min=9, or min=33).

    Raises:
        TypeError: no bool tensor.
        ValueError: another kind.
    """
    check.is_tensor("pack_mask", "mask", mask, (torch.bool,))
    check.is_one_of("pack_mask", "kind", kind, PACKED)
    return torch.ops.sfpk.pack_mask(mask, kind, backend or "")


def unpack_mask(
    packed: Tensor,  # (…, units) uint8 or int32
    d: int,
    *,
    backend: str | None = None,
) -> Tensor:  # (…, d) bool
    """The bool mask of d coordinates behind packed bits.

    Raises:
        TypeError: another dtype.
        ValueError: bits for another number of coordinates.
    """
    check.is_tensor("unpack_mask", "packed", packed, _DTYPES)
    if packed.dim() == 0 or packed.shape[-1] != units(packed.dtype, d):
        raise ValueError(
            f"unpack_mask: packed: wanted {units(packed.dtype, d)} entries along the last dimension for d = {d}, "
            f"got shape {tuple(packed.shape)}"
        )
    return torch.ops.sfpk.unpack_mask(packed, d, backend or "")


def popcount(
    packed: Tensor,  # (…, units) uint8 or int32
    *,
    backend: str | None = None,
) -> Tensor:  # (…) int64
    """How many coordinates each packed mask keeps."""
    check.is_tensor("popcount", "packed", packed, _DTYPES)
    if packed.dim() == 0:
        raise ValueError("popcount: packed: wanted shape (…, units), got ()")
    return torch.ops.sfpk.popcount(packed, backend or "")


def mask_iou(
    a: Tensor,  # (n, units) uint8 or int32
    b: Tensor | None = None,  # (m, units); None for a
    *,
    backend: str | None = None,
) -> Tensor:  # (n, m) fp64
    """Intersection over union of every pair of packed masks; 1 for two empty masks.

    Raises:
        TypeError: no packed masks, or two dtypes.
        ValueError: another shape or device.
    """
    both, of_a, of_b = _pairs("mask_iou", a, b, backend)
    union = of_a[:, None] + of_b - both
    return torch.where(union > 0, both.double() / union.clamp_min(1), 1.0)


def mask_hamming(
    a: Tensor,  # (n, units) uint8 or int32
    b: Tensor | None = None,  # (m, units); None for a
    *,
    backend: str | None = None,
) -> Tensor:  # (n, m) int64
    """In how many coordinates every pair of packed masks differs; errors as in :func:`mask_iou`."""
    both, of_a, of_b = _pairs("mask_hamming", a, b, backend)
    return of_a[:, None] + of_b - 2 * both


def _pairs(op: str, a: Tensor, b: Tensor | None, backend: str | None) -> tuple[Tensor, Tensor, Tensor]:
    b = a if b is None else b
    for name, tensor in (("a", a), ("b", b)):
        check.is_tensor(op, name, tensor, _DTYPES)
        if tensor.dim() != 2:
            raise ValueError(f"{op}: {name}: wanted shape (n, units), got {tuple(tensor.shape)}")
    if b.dtype != a.dtype:
        raise TypeError(f"{op}: b: wanted {a.dtype} as in a, got {b.dtype}")
    check.has_shape(op, "b", b, (b.shape[0], a.shape[1]))
    check.same_device(op, "b", b, a.device)
    both = torch.ops.sfpk.mask_overlaps(a, b, backend or "")
    return both, popcount(a, backend=backend), popcount(b, backend=backend)


BACKENDS = {
    name: {"cpp": Backend(getattr(cpp, name), cpp.why_not), "reference": Backend(getattr(reference, name))}
    for name in ("pack_mask", "unpack_mask", "popcount", "overlaps")
}


def _define(name: str, schema: str, implementation: str, fake: Any) -> None:
    backends = BACKENDS[implementation]

    def run(call: Any) -> Tensor:
        tensor, *arguments, backend = call
        result: Tensor = choose(name, backend, backends, tensor)(tensor, *arguments)
        return result

    torch.library.define(f"sfpk::{name}", schema)
    register(f"sfpk::{name}", run, fake)
    transforms.register_vmap(f"sfpk::{name}", getattr(torch.ops.sfpk, name))


def _pack_fake(call: Any) -> Tensor:
    shape, dtype = mask_shape(tuple(call.mask.shape), call.kind)
    packed: Tensor = call.mask.new_empty(shape, dtype=dtype)
    return packed


def _unpack_fake(call: Any) -> Tensor:
    mask: Tensor = call.packed.new_empty((*call.packed.shape[:-1], call.d), dtype=torch.bool)
    return mask


def _popcount_fake(call: Any) -> Tensor:
    counts: Tensor = call.packed.new_empty(call.packed.shape[:-1], dtype=torch.int64)
    return counts


def _overlaps_fake(call: Any) -> Tensor:
    counts: Tensor = call.a.new_empty((call.a.shape[0], call.b.shape[0]), dtype=torch.int64)
    return counts


_define("pack_mask", "(Tensor mask, str kind, str backend) -> Tensor", "pack_mask", _pack_fake)
_define("unpack_mask", "(Tensor packed, SymInt d, str backend) -> Tensor", "unpack_mask", _unpack_fake)
_define("popcount", "(Tensor packed, str backend) -> Tensor", "popcount", _popcount_fake)
_define("mask_overlaps", "(Tensor a, Tensor b, str backend) -> Tensor", "overlaps", _overlaps_fake)

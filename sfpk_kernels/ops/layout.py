"""How coordinates govern weights, and the arguments of the masking ops by backend-neutral pieces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks as check
from ..bits._shape import BITS, units
from ..codes import MaskKind


class Blocks(NamedTuple):
    """``groups`` coordinates over a piece of weights seen as (outer, groups, inner).

    Coordinate g governs all of [:, g, :]. A tensor's output channels are ``Blocks(1, shape[0], rest)``, the input
    channels of a convolution ``Blocks(shape[0], shape[1], kernel size)``, its single weights ``Blocks(1, numel, 1)``.
    """

    outer: int
    groups: int
    inner: int

    @property
    def numel(self) -> int:
        """Weights of the piece."""
        return self.outer * self.groups * self.inner


@dataclass(frozen=True)
class Piece:
    """Weights that one :class:`Blocks` describes, one after the other in memory."""

    tensor: int  # index in the caller's list
    begin: int  # its first weight in that tensor, flattened
    first: int  # its first coordinate
    blocks: Blocks

    @property
    def coordinates(self) -> slice:
        """Its part of the coordinates."""
        return slice(self.first, self.first + self.blocks.groups)

    def of(self, tensor: Tensor) -> Tensor:
        """Its part (…, numel) of a tensor (…, all weights of the caller's tensor)."""
        return tensor[..., self.begin : self.begin + self.blocks.numel]


def normalize(op: str, layout: Any, sizes: Sequence[int]) -> list[int]:
    """The layout as the ops take it, three numbers a piece; empty for one coordinate per weight.

    Raises:
        TypeError, ValueError: no list of Blocks, or one that does not fit weights of these sizes.
    """
    if layout is None:
        return []
    entries = [layout] if isinstance(layout, Blocks) else layout
    if not isinstance(entries, Sequence) or not all(isinstance(b, Sequence) and len(b) == 3 for b in entries):
        raise TypeError(f"{op}: layout: wanted a list of Blocks(outer, groups, inner), got {layout!r:.80}")
    # Symbolic sizes stay so.
    flat: list[Any] = [v if isinstance(v, int | torch.SymInt) else int(v) for blocks in entries for v in blocks]
    if any(v < 1 for v in flat):
        raise ValueError(f"{op}: layout: wanted numbers ≥ 1, got {layout!r:.80}")
    covered = pieces(flat, sizes)
    if covered is None:
        wanted = (
            f"blocks of {' + '.join(map(str, sizes))} weights" if len(sizes) < 5 else f"blocks of {sum(sizes)} weights"
        )
        got = " + ".join(str(math.prod(b)) for b in entries[:5]) + (" + …" if len(entries) > 5 else "")
        raise ValueError(f"{op}: layout: wanted {wanted}, each within one tensor, got {got}")
    return flat


def pieces(flat: Sequence[int], sizes: Sequence[int]) -> list[Piece] | None:
    """The pieces of a layout, or None where it does not fit tensors of these sizes."""
    triples: list[Blocks] = [Blocks(*flat[i : i + 3]) for i in range(0, len(flat), 3)]
    if not flat:
        triples = [Blocks(1, size, 1) for size in sizes]
    done: list[Piece] = []
    tensor, begin, first = 0, 0, 0
    for blocks in triples:
        while flat and tensor < len(sizes) and begin == sizes[tensor]:
            tensor, begin = tensor + 1, 0
        if tensor == len(sizes) or begin + blocks.numel > sizes[tensor]:
            return None
        done.append(Piece(tensor, begin, first, blocks))
        begin, first = begin + blocks.numel, first + blocks.groups
        if not flat:
            tensor, begin = tensor + 1, 0
    rest = sum(sizes[tensor:]) - begin
    return done if rest == 0 else None


def count(flat: Sequence[int], sizes: Sequence[int]) -> int:
    """How many coordinates a layout has."""
    return sum(flat[1::3]) if flat else sum(sizes)


@dataclass(frozen=True)
class Mask:
    """What is kept: one of bools, packed bits, factors, or values with the cut they are compared with."""

    values: Tensor  # (n, d), packed (n, bytes or words)
    d: int
    threshold: Tensor | None  # (n, S)
    tie_end: Tensor | None  # (n, S)
    score: str
    saliency: Tensor | None  # (d,)
    segments: list[int]  # (S + 1)

    @property
    def kind(self) -> MaskKind:
        """What the kernels are told it is."""
        if self.threshold is not None:
            return MaskKind.CUT
        if self.values.dtype == torch.bool:
            return MaskKind.BOOL
        return MaskKind.FACTORS if self.values.is_floating_point() else MaskKind.PACKED

    @property
    def multiplies(self) -> bool:
        """Whether it is made of factors."""
        return self.kind == MaskKind.FACTORS


def check_mask(op: str, mask: Any, d: int, device: torch.device) -> Tensor:
    """``mask`` is bool, packed or float, for d coordinates."""
    check.is_tensor(op, "mask", mask, (torch.bool, *check.FLOATS, *BITS))
    wanted = units(mask.dtype, d)
    if mask.dim() not in (1, 2) or mask.shape[-1] != wanted:
        raise ValueError(f"{op}: mask: wanted shape ({wanted},) or (n, {wanted}), got {tuple(mask.shape)}")
    check.same_device(op, "mask", mask, device)
    return mask


def gapless(rows: Tensor) -> Tensor:
    """Rows may lie apart, entries of a row may not."""
    if rows.shape[1] <= 1 or rows.stride(1) == 1:
        return rows
    # Without entries, every tensor is contiguous already.
    return rows.contiguous() if rows.numel() else torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)

"""Launches the Triton kernels of masked weights (triton_kernels.py, imported only when it runs)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import _triton
from ...utils.tensors import gapless
from ..codes import MOST_ROWS, MaskKind, Score, score_code
from ..layout import Piece
from ..packing import BITS
from ._arguments import Mask

_BLOCK = 1024


def why_not(tensor: Tensor) -> str | None:
    """Why the kernels cannot run on weights, a mask or an output."""
    if tensor.dtype == torch.float64:
        return "it takes fp32, bf16 or fp16, this is float64"
    return _triton.why_not(tensor)


def masked_weights_(weights: Sequence[Tensor], mask: Mask, pieces: Sequence[Piece], outs: Sequence[Tensor]) -> None:
    """As :func:`.reference.masked_weights_`."""
    from . import triton_kernels as kernels

    values = gapless(mask.values)
    cuts = mask.kind == MaskKind.CUT
    saliency = values if mask.saliency is None else mask.saliency.float().contiguous()
    threshold = values if mask.threshold is None else mask.threshold.float().contiguous()
    tie_end = values if mask.tie_end is None else mask.tie_end.contiguous()
    data = values.view(torch.uint8) if mask.kind == MaskKind.BOOL else values
    n, segments = values.shape[0], len(mask.segments) - 1
    for weight, piece, out in zip(weights, pieces, outs, strict=True):
        target = gapless(out)
        parts = _parts(piece, mask.segments if cuts else [0, mask.d])
        for part in parts:
            if not n or part.begin == part.end:
                continue
            column = part.segment if cuts else 0
            _triton.launch(
                kernels.apply, (-(-(part.end - part.begin) // _BLOCK),), weight.device,
                weight, data, saliency, threshold.flatten()[column:], tie_end.flatten()[column:], target, n,
                data.stride(0), segments, target.stride(0), part.begin, part.end, piece.first, piece.groups,
                piece.inner, part.low, part.high,
                KIND=mask.kind.value, SCORE=score_code(mask.score) if cuts else Score.VALUE.value,
                SINGLE=piece.single, PART=not piece.single and len(parts) > 1, BITS=BITS.get(values.dtype, 1),
                BLOCK=_BLOCK,
            )  # fmt: skip
        if target is not out:
            out.copy_(target)


class _Part(NamedTuple):
    """What one cut decides of a piece."""

    segment: int
    begin: int  # weights
    end: int
    low: int  # coordinates
    high: int


def _parts(piece: Piece, segments: list[int]) -> list[_Part]:
    """A piece by segments; where a coordinate has several weights, each part looks through all of the piece."""
    parts = []
    for s, (a, b) in enumerate(itertools.pairwise(segments)):
        low, high = max(a, piece.first), min(b, piece.end)
        if low < high:
            begin, end = (low - piece.first, high - piece.first) if piece.single else (0, piece.numel)
            parts.append(_Part(s, begin, end, low, high))
    return parts


def mask_gradient_(weights: Sequence[Tensor], grads: Sequence[Tensor], pieces: Sequence[Piece], out: Tensor) -> None:
    """As :func:`.reference.mask_gradient_`."""
    from . import triton_kernels as kernels

    n = out.shape[0]
    for weight, grad, piece in zip(weights, grads, pieces, strict=True):
        rows, target = gapless(grad), out[:, piece.coordinates]
        if not n:
            continue
        if n > MOST_ROWS and not piece.single:
            raise ValueError(
                f"mask_gradient: weight_grads: wanted up to {MOST_ROWS:,} rows for backend 'triton', got {n:,}"
            )
        adds = out.dtype == torch.float64
        if piece.single:
            grid = (-(-piece.groups // _BLOCK),)
            _triton.launch(
                kernels.products, grid, weight.device, weight, rows, target, n, rows.stride(0), out.stride(0),
                piece.groups, ADDS=adds, BLOCK=_BLOCK,
            )  # fmt: skip
            continue
        wide = min(256, 1 << max(0, (piece.inner - 1).bit_length()))
        tall = max(1, 1024 // wide)
        _triton.launch(
            kernels.group_sums, (-(-piece.groups // tall), n), weight.device, weight, rows, target, rows.stride(0),
            out.stride(0), piece.outer, piece.groups, piece.inner, ADDS=adds, G=tall, WIDE=wide,
        )  # fmt: skip

"""Launches the Triton kernels of the exact selection (triton_kernels.py, imported only when it runs).

Four reads of the scores, one more where ties are cut. The host reads back whether a score was NaN, and nothing where k
lies on the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _triton
from ...utils.tensors import gapless
from ..bits import reference as bits
from ..codes import score_code
from ..packing import BITS, mask_shape
from . import _device
from ._arguments import Cut
from ._selection import Selection

_BLOCK, _TILES = 1024, 16
_CHUNK = _BLOCK * _TILES


def why_not(values: Tensor) -> str | None:
    """Why the kernels cannot run on these values."""
    if values.dtype == torch.float64:
        return "it takes fp32, bf16 or fp16 values, these are float64"
    return _triton.why_not(values)


def select(selection: Selection) -> tuple[Cut, list[Tensor]]:
    """As :func:`.reference.select`."""
    from . import triton_kernels as kernels

    device = selection.values[0].device
    excluded = selection.set_aside()
    k, candidates = _device.counts(selection, excluded)
    rows = selection.rows
    d = selection.segments[-1]
    parts = _parts(selection, excluded)
    chunks = sum(-(-part["d"] // _CHUNK) for part in parts)
    state = torch.zeros((rows, kernels.COLUMNS.value), dtype=torch.int64, device=device)
    state[:, kernels.WANTED.value] = k
    bins = torch.zeros((rows, kernels.DIGITS.value), dtype=torch.int64, device=device)
    ties = torch.empty((rows, max(chunks, 1)), dtype=torch.int64, device=device)
    cut = Cut(
        torch.empty((rows, 1), dtype=torch.float32, device=device),
        torch.empty((rows, 1), dtype=torch.int64, device=device),
    )
    constants = {"SCORE": score_code(selection.score), "EXCLUDES": bool(excluded), "BLOCK": _BLOCK, "TILES": _TILES}

    for shift in (24, 16, 8, 0):
        for part in parts:
            grid = (-(-part["d"] // _CHUNK), rows)
            _triton.launch(
                kernels.count_digits, grid, device, *part["source"], state, bins, *part["numbers"], SHIFT=shift,
                **constants,
            )  # fmt: skip
        _triton.launch(kernels.choose_digit, (rows,), device, state, bins)
    first_chunk = 0
    for part in parts:
        grid = (-(-part["d"] // _CHUNK), rows)
        _triton.launch(
            kernels.count_ties, grid, device, *part["source"], state, ties, *part["numbers"], first_chunk,
            max(chunks, 1), **constants,
        )  # fmt: skip
        first_chunk += grid[0]
    _triton.launch(kernels.find_chunk, (rows,), device, state, ties, k, candidates, *cut, chunks, d, BLOCK=_BLOCK)
    first_chunk = 0
    for part in parts:
        last = first_chunk - (-part["d"] // _CHUNK)
        _triton.launch(
            kernels.find_tie, (rows,), device, *part["source"], state, cut.tie_end, *part["numbers"], part["first"],
            first_chunk, last, **constants,
        )  # fmt: skip
        first_chunk = last
    if not _device.knows_all(selection):
        _device.check_nan(selection, state[:, kernels.NAN.value] != 0)
    masks = [] if selection.output == "cut" else _write(selection, parts, state, cut, constants)
    return cut, masks


def _parts(selection: Selection, excluded: list[Tensor]) -> list[dict[str, Any]]:
    """What the kernels take of each tensor; rows beside each other, tensors one after the other."""
    parts, first = [], 0
    n = selection.values[0].shape[0] if selection.by_rows else 1
    for i, tensor in enumerate(selection.values):
        values = gapless(tensor if selection.by_rows else tensor.reshape(1, -1))
        d = values.shape[1]
        saliency = selection.saliency[i].float().reshape(-1).contiguous() if selection.saliency else values
        aside, row_aside = _rows(excluded[i], d) if excluded else (values, 0)
        always, row_always = _rows(selection.protected[i], d) if selection.protected else (values, 0)
        if d:
            parts.append({
                "d": d, "first": first, "index": i, "source": (values, saliency, aside), "always": (always, row_always),
                "numbers": (n, values.stride(0), row_aside, d, 1.0 / max(n, 1)),
            })  # fmt: skip
        first += d
    return parts


def _rows(mask: Tensor, d: int) -> tuple[Tensor, int]:
    """A bool mask as bytes in rows, and the distance of its rows."""
    rows = gapless(mask.reshape(-1, d) if mask.dim() != 2 or mask.shape[1] != d else mask)
    return rows.view(torch.uint8), rows.stride(0)


def _write(
    selection: Selection, parts: list[dict[str, Any]], state: Tensor, cut: Cut, constants: dict[str, Any]
) -> list[Tensor]:
    from . import triton_kernels as kernels

    rows, device = state.shape[0], state.device
    # Bits lie along the last dimension: those of rows are packed at once, those of a list's tensors afterwards.
    kind = selection.output if selection.by_rows else "bool"
    shapes = [(rows, selection.segments[-1])] if selection.by_rows else [tuple(t.shape) for t in selection.values]
    masks = []
    for shape in shapes:
        packed, dtype = mask_shape(shape, kind)
        masks.append(torch.empty(packed, dtype=dtype, device=device))
    for part in parts:
        mask = masks[part["index"]]
        out = (mask.view(torch.uint8) if kind == "bool" else mask).view(rows, -1)
        always, row_always = part["always"]
        n, stride, row_aside, d, scale = part["numbers"]
        _triton.launch(
            kernels.write_mask, (-(-d // _BLOCK), rows), device,
            *part["source"], always, state, *cut, out, n, stride, row_aside, row_always, out.stride(0), d, scale,
            part["first"], SCORE=constants["SCORE"], EXCLUDES=constants["EXCLUDES"], ALWAYS=bool(selection.protected),
            UNIT=BITS.get(mask.dtype, 1), BLOCK=_BLOCK,
        )  # fmt: skip
    return masks if selection.by_rows else [bits.pack_mask(mask, selection.output) for mask in masks]

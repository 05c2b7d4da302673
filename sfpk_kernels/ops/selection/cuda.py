"""Exact selection in CUDA (csrc/cuda/selection_kernels.cu): three reads of the scores, two from a good guess."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _extension
from ...utils.tensors import gapless
from ..bits import reference as bits
from ..codes import SELECTION_CHUNK, SELECTION_COUNTERS, SELECTION_STATE_COLUMNS, score_code
from ..packing import BITS, mask_shape
from . import _device
from ._arguments import Cut
from ._selection import Selection


def why_not(values: Tensor) -> str | None:
    """Why the kernels cannot run on these values."""
    if values.device.type != "cuda":
        return f"it runs on CUDA devices, the values are on {values.device}"
    if values.dtype == torch.float64:
        return "it takes fp32, bf16 or fp16 values, these are float64"
    return _extension.without_cuda()


def select(selection: Selection) -> tuple[Cut, list[Tensor]]:
    """As :func:`.reference.select`."""
    device = selection.values[0].device
    excluded = selection.set_aside()
    k, candidates = _device.counts(selection, excluded)
    rows = selection.rows
    values = [gapless(t) if selection.by_rows else gapless(t.reshape(1, -1)) for t in selection.values]
    aside, always = ([gapless(m.reshape(rows, -1)) for m in masks] for masks in (excluded, selection.protected))
    kind = selection.output if selection.by_rows or selection.output == "cut" else "bool"
    masks: list[Tensor] = []
    if kind != "cut":
        shapes = [mask_shape((rows, v.shape[1]), kind) for v in values]
        masks = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes]
    chunks = sum(-(-v.shape[1] // SELECTION_CHUNK) for v in values)
    cut = Cut(
        torch.empty((rows, 1), dtype=torch.float32, device=device),
        torch.empty((rows, 1), dtype=torch.int64, device=device),
    )
    state, bins, ties = (
        torch.empty(rows * size, dtype=torch.int64, device=device)
        for size in (SELECTION_STATE_COLUMNS, SELECTION_COUNTERS, chunks)
    )
    unit = 0 if kind == "cut" else BITS.get(masks[0].dtype, 1)
    guess = None if selection.guess is None else selection.guess.float().reshape(-1).contiguous()
    torch.ops.sfpk_cpp.topk_device_(
        values, score_code(selection.score), [t.float().reshape(-1).contiguous() for t in selection.saliency], aside,
        always, k, candidates, guess, unit, masks, cut.threshold, cut.tie_end, state, bins, ties,
    )  # fmt: skip
    if not _device.knows_all(selection):
        _device.check_nan(selection, cut.threshold.isnan())
    if selection.by_rows or not masks:
        return cut, masks
    shaped = [m.view(t.shape) for m, t in zip(masks, selection.values, strict=True)]
    return cut, [bits.pack_mask(mask, selection.output) for mask in shaped]

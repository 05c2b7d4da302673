"""Exact selection in C++ (csrc/cpu/selection.cpp): about one read of the values, no score is ever written."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _extension
from ...utils.tensors import gapless
from ..codes import Packing, packing_code, score_code
from ..packing import mask_shape
from ._arguments import Cut
from ._selection import Selection, nan_error, remaining

_VALUES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(values: Tensor) -> str | None:
    """Why the kernel cannot run on these values."""
    if values.device.type != "cpu":
        return f"it runs on the CPU, the values are on {values.device}"
    if values.dtype not in _VALUES:
        return f"it takes fp32, bf16 or fp16 values, these are {str(values.dtype).removeprefix('torch.')}"
    return _extension.unavailable()


def select(selection: Selection) -> tuple[Cut, list[Tensor]]:
    """As :func:`.reference.select`."""
    values = [_dense(t, selection.by_rows) for t in selection.values]
    device = values[0].device
    saliency = [t.float().contiguous() for t in selection.saliency]
    excluded, protected = ([t.contiguous() for t in masks] for masks in (selection.set_aside(), selection.protected))
    score, rows = score_code(selection.score), selection.rows
    shapes = [(rows, values[0].shape[1])] if selection.by_rows else [tuple(t.shape) for t in values]
    if selection.pattern is not None:
        left_out = [torch.empty(shape, dtype=torch.bool, device=device) for shape in shapes]
        wrong = torch.ops.sfpk_cpp.pattern_excluded_(
            values, selection.by_rows, score, saliency, excluded, protected, *selection.pattern, left_out
        )
        if wrong >= 0:
            raise nan_error(selection, wrong)
        excluded = left_out
    counts, limits = remaining(selection, excluded)
    parts = limits.shape[2]
    cut = Cut(
        torch.empty((rows, parts), dtype=torch.float32, device=device),
        torch.empty((rows, parts), dtype=torch.int64, device=device),
    )
    masks = []
    if selection.output != "cut":
        kinds = [mask_shape(shape, selection.output) for shape in shapes]
        masks = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in kinds]
    guess = None if selection.guess is None else selection.guess.float().contiguous()
    packing = packing_code(selection.output) if masks else Packing.NONE.value
    # fmt: off
    wrong = torch.ops.sfpk_cpp.topk_(
        values, selection.by_rows, score, saliency, excluded, protected, [t.contiguous() for t in selection.sizes],
        torch.tensor(counts, dtype=torch.int64, device=device),
        torch.tensor(selection.segments, dtype=torch.int64, device=device), limits, guess, packing, masks,
        cut.threshold, cut.tie_end,
    )
    # fmt: on
    if wrong >= 0:
        raise nan_error(selection, wrong)
    return cut, masks


def _dense(values: Tensor, by_rows: bool) -> Tensor:
    """Rows may lie apart, entries of a row may not; a tensor of a list is contiguous."""
    if by_rows:
        return gapless(values)
    return values.contiguous()

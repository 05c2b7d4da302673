"""Exact selection in C++ (csrc/cpu/selection.cpp): about one read of the values, no score is ever written."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _extension
from ..bits._shape import mask_shape
from ..codes import Packing, packing_code, score_code
from . import _device
from ._arguments import Cut
from ._problem import Problem, nan_error, plan

_VALUES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(values: Tensor) -> str | None:
    """Why the kernel cannot run on these values."""
    if values.device.type != "cpu":
        return f"it runs on the CPU, the values are on {values.device}"
    if values.dtype not in _VALUES:
        return f"it takes fp32, bf16 or fp16 values, these are {str(values.dtype).removeprefix('torch.')}"
    return _extension.unavailable()


def select(problem: Problem) -> tuple[Cut, list[Tensor]]:
    """As :func:`.reference.select`."""
    values = [_dense(t, problem.by_rows) for t in problem.values]
    device = values[0].device
    saliency = [t.float().contiguous() for t in problem.saliency]
    excluded, protected = ([t.contiguous() for t in masks] for masks in (problem.set_aside(), problem.protected))
    score, rows = score_code(problem.score), problem.rows
    shapes = [(rows, values[0].shape[1])] if problem.by_rows else [tuple(t.shape) for t in values]
    if problem.pattern is not None:
        left_out = [torch.empty(shape, dtype=torch.bool, device=device) for shape in shapes]
        wrong = torch.ops.sfpk_cpp.pattern_excluded_(
            values, problem.by_rows, score, saliency, excluded, protected, *problem.pattern, left_out
        )
        if wrong >= 0:
            raise nan_error(problem, wrong)
        excluded = left_out
    counts, limits = plan(problem, excluded)
    parts = limits.shape[2]
    cut = Cut(
        torch.empty((rows, parts), dtype=torch.float32, device=device),
        torch.empty((rows, parts), dtype=torch.int64, device=device),
    )
    masks = []
    if problem.output != "cut":
        kinds = [mask_shape(shape, problem.output) for shape in shapes]
        masks = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in kinds]
    guess = None if problem.guess is None else problem.guess.float().contiguous()
    packing = packing_code(problem.output) if masks else Packing.NONE.value
    # fmt: off
    wrong = torch.ops.sfpk_cpp.topk_(
        values, problem.by_rows, score, saliency, excluded, protected, [t.contiguous() for t in problem.sizes],
        torch.tensor(counts, dtype=torch.int64, device=device),
        torch.tensor(problem.segments, dtype=torch.int64, device=device), limits, guess, packing, masks, cut.threshold,
        cut.tie_end,
    )
    # fmt: on
    if wrong >= 0:
        raise nan_error(problem, wrong)
    return cut, masks


def _dense(values: Tensor, by_rows: bool) -> Tensor:
    """Rows may lie apart, entries of a row may not; a tensor of a list is contiguous."""
    if by_rows:
        return _device.as_rows(values)
    return values.contiguous()

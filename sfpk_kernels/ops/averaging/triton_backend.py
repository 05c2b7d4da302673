"""Launches the Triton kernel of averages of gradients (triton_kernels.py, imported only when it runs)."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _triton
from ...utils.tensors import gapless
from ..codes import MOST_ROWS
from .spec import GradientStats, statistics

_BLOCK, _TILES = 1024, 8


def why_not(grads: Tensor) -> str | None:
    """Why the kernel cannot run on these gradients."""
    if grads.dtype == torch.float64:
        return "it takes fp32, bf16 or fp16, this is float64"
    if grads.shape[0] > MOST_ROWS:
        return f"it takes up to {MOST_ROWS:,} rows, these are {grads.shape[0]:,}"
    return _triton.why_not(grads)


def average_gradients_(grads: Tensor, averages: Tensor | None, weights: Tensor, beta: float) -> GradientStats:
    """As :func:`.reference.average_gradients_`; weights in fp64 are rounded to fp32."""
    from . import triton_kernels as kernels

    n, d = grads.shape
    parts = -(-d // (_BLOCK * _TILES))
    sums = torch.empty((n, parts, 4), dtype=torch.float64, device=grads.device)
    if n and parts:
        rows = gapless(grads)
        others = rows if averages is None else gapless(averages)
        if weights.dtype == torch.float64:
            weights = weights.float()
        writes = averages is not None and beta > 0
        far = beta >= 0.5  # the nearer end is the average
        _triton.launch(
            kernels.average, (parts, n), grads.device, rows, others, weights.contiguous(), sums, d, rows.stride(0),
            others.stride(0), beta - 1.0 if far else beta, AVERAGES=averages is not None, WRITES=writes, FAR=far,
            BLOCK=_BLOCK, TILES=_TILES,
        )  # fmt: skip
        if writes and rows is not grads:
            grads.copy_(rows)
    return statistics(sums.sum(1), d)

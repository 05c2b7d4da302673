"""Averages of gradients in C++ (csrc/cpu/averaging.cpp): one read of each argument, one write of the gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _extension
from ...utils.tensors import gapless
from .spec import GradientStats


def why_not(grads: Tensor) -> str | None:
    """Why the kernel cannot run on these gradients."""
    if grads.device.type != "cpu":
        return f"it runs on the CPU, the gradients are on {grads.device}"
    return _extension.unavailable()


def average_gradients_(grads: Tensor, averages: Tensor | None, weights: Tensor, beta: float) -> GradientStats:
    """As :func:`.reference.average_gradients_`; weights in fp64 beside other gradients are rounded to fp32."""
    if (weights.dtype == torch.float64) != (grads.dtype == torch.float64):
        weights = weights.to(torch.float64 if grads.dtype == torch.float64 else torch.float32)
    rows = gapless(grads)
    found = torch.ops.sfpk_cpp.average_gradients_(
        rows, None if averages is None else gapless(averages), weights.contiguous(), beta
    )
    if rows is not grads:
        grads.copy_(rows)
    return GradientStats(*found)

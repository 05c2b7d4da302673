"""Averages of gradients in plain PyTorch: the ground truth every other backend is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from .spec import GradientStats, statistics

_PART = 1 << 18  # entries that are in fp64 at once: a whole network's would take as much memory again, and more


def average_gradients_(grads: Tensor, averages: Tensor | None, weights: Tensor, beta: float) -> GradientStats:
    """The public op's work, on checked arguments."""
    rows, d = grads.shape
    sums = torch.zeros(rows, 4, dtype=torch.float64, device=grads.device)
    size = max(1, _PART // max(1, rows))
    for begin in range(0, d, size):
        columns = slice(begin, begin + size)
        g, w = grads[:, columns], weights[columns].double()
        a = g.double() * w
        squares = a.square()
        sums[:, 1] += squares.sum(1)
        sums[:, 3] += squares.square_().sum(1)
        if averages is not None:
            v = averages[:, columns]
            b = v.double() * w
            sums[:, 0] += a.mul_(b).sum(1)
            sums[:, 2] += b.square_().sum(1)
            if beta > 0:
                g.lerp_(v, beta)
    return statistics(sums, d)

"""The arithmetic of one step as it is usually written: what the fused transition is measured against."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor


def naive(masks: Tensor, grads: Tensor, step: float, radius: float, repulsion: float) -> Tensor:
    """Algorithm 3's arithmetic: one particle at a time, autograd through the penalty and the density."""
    n, d = masks.shape
    moved = []
    for i in range(n):
        m = masks[i].clone().requires_grad_()
        penalty = torch.stack([torch.exp(-((m - other) ** 2).sum() / d) for other in masks]).mean()
        (grad_kernel,) = torch.autograd.grad(penalty, m)
        (s,) = torch.autograd.grad(1 - ((m**2).sum() / d).sqrt(), m)
        g = -grads[i] - repulsion * grad_kernel
        inner, s_square, g_square = s @ g, s @ s, g @ g
        x = torch.sqrt((radius**2 - 1) / (s_square * g_square - inner**2))
        y = (1 - x * inner) / s_square
        moved.append(masks[i] + step * (x * g + y * s))
    return torch.stack(moved)


def eager(
    masks: Tensor,
    grads: Tensor,
    step: float,
    radius: float,
    repulsion: float,
    gram: Callable[[Tensor], Tensor] = lambda centred: centred @ centred.T,
) -> Tensor:
    """All particles at once, distances and repulsion by matrix products."""
    n, d = masks.shape
    centred = masks - masks.mean(dim=0)
    inner = gram(centred)
    square = inner.diagonal()
    distances = square[:, None] + square[None, :] - 2 * inner
    strength = 2 / d * torch.exp(-distances / d)
    laplacian = (torch.diag(strength.sum(1)) - strength) / n
    g = -grads + repulsion * (laplacian @ centred)
    norm = masks.norm(dim=1, keepdim=True)
    unit = -masks / norm
    u = g - (unit * g).sum(1, keepdim=True) * unit
    tangent = math.sqrt(radius**2 - 1) * u / u.norm(dim=1, keepdim=True)
    slope = norm / (d * (norm**2 / d).sqrt())
    return masks + step / slope * (unit + tangent)


@cache
def _keops_sum(n: int) -> Callable[..., Tensor]:
    from pykeops.torch import Genred

    reduction: Callable[..., Tensor] = Genred("one * TensorProd(x, x)", ["one = Vi(1)", f"x = Vj({n})"], "Sum", axis=1)
    return reduction


def keops(masks: Tensor, grads: Tensor, step: float, radius: float, repulsion: float) -> Tensor:
    """As :func:`eager`, with the sums behind the RBF kernel by KeOps.

    KeOps holds one point in registers and reduces over points: the coordinates are the points here, their n values
    the vector.
    """

    def gram(centred: Tensor) -> Tensor:
        n = len(centred)
        one = torch.ones(1, 1, dtype=centred.dtype, device=centred.device)
        return _keops_sum(n)(one, centred.T.contiguous()).view(n, n)

    return eager(masks, grads, step, radius, repulsion, gram)

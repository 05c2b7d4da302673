"""One step of mask arithmetic, as it is usually written: what the fused transition is measured against."""

import math

import torch


def naive(masks, grads, step, radius, repulsion):
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


def eager(masks, grads, step, radius, repulsion):
    """All particles at once, distances and repulsion by matrix products."""
    n, d = masks.shape
    centred = masks - masks.mean(dim=0)
    inner = centred @ centred.T
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

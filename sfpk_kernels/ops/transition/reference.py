"""The projected transition in plain PyTorch: the ground truth every other backend is compared with.

Elementwise arithmetic runs in the dtype of ``masks`` (fp32 for two-byte ones), every sum over coordinates in fp64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..codes import TANGENT_TOLERANCE
from . import rounding


class TransitionStats(NamedTuple):
    """What one transition leaves behind, all fp64 on the particles' device; pass it on as ``state``."""

    densities: Tensor  # (n,) soft density ρ(m_i) after the step
    norms: Tensor  # (n,) ‖m_i‖₂ after the step
    slope_norms: Tensor  # (n,) ‖c ⊙ m_i‖₂ after the step; equals norms where sizes is None
    saliency_norms: Tensor  # (n,) Σ_e a_e m_ie² after the step; zeros for kernel "rbf"
    sq_distances: Tensor  # (n, n) q_ij = Σ_e w_e (m_ie - m_je)² after the step
    cosines: Tensor  # (n,) cosine between the transition's move and the descent direction -∂L/∂m_i; NaN if skipped


def _sum(values: Tensor) -> Tensor:
    return values.sum(dim=-1, dtype=torch.float64)


def _density(masks: Tensor, sizes: Tensor | None, density: str) -> Tensor:
    """ρ(m_i) (n,): sqrt(Σ c m² / D) for "l2", Σ c m² / D for "l2_squared"."""
    squares = masks.square() if sizes is None else masks.square() * sizes
    total = float(masks.shape[1]) if sizes is None else _sum(sizes)
    share = _sum(squares) / total
    return share.sqrt() if density == "l2" else share


def check_finite(
    cosines: Tensor,  # (n,)
) -> None:
    """Raise a ValueError that names the particles whose gradient was not finite: their cosine is NaN."""
    rows = [i for i, cosine in enumerate(cosines.tolist()) if math.isnan(cosine)]
    if rows:
        raise ValueError(f"transition_: grads: wanted finite gradients, got non-finite ones in particles {rows}")


def measure(
    masks: Tensor,  # (n, d)
    saliency: Tensor | None,  # (d,)
    sizes: Tensor | None,  # (d,)
    kernel: str,
    density: str,
) -> TransitionStats:
    """The statistics of particles that have not moved yet (cosines are zero)."""
    n = masks.shape[0]
    weighted = kernel == "weighted_rbf"
    zeros = masks.new_zeros(n, dtype=torch.float64)
    distances = masks.new_zeros((n, n), dtype=torch.float64)
    for i in range(n):
        squares = (masks - masks[i]).square()
        distances[i] = _sum(squares * saliency.square() if weighted and saliency is not None else squares)
    norms = _sum(masks.square()).sqrt()
    return TransitionStats(
        densities=_density(masks, sizes, density),
        norms=norms,
        slope_norms=norms.clone() if sizes is None else _sum((masks * sizes).square()).sqrt(),
        saliency_norms=_sum(masks.square() * saliency) if weighted and saliency is not None else zeros,
        sq_distances=distances,
        cosines=zeros.clone(),
    )


def _repulsion(
    masks: Tensor,  # (n, d)
    state: TransitionStats,
    saliency: Tensor | None,
    kernel: str,
) -> Tensor:  # (n, d)
    """(1/n) Σ_j (2 κ_ij / h_ij) w ⊙ (m_i - m_j), the direction that lowers the mean kernel value."""
    n, d = masks.shape
    if kernel == "rbf":
        bandwidth = torch.full_like(state.sq_distances, float(d))
    else:
        bandwidth = (state.saliency_norms[:, None] * state.saliency_norms[None, :]).sqrt()
    strength = 2.0 / bandwidth * torch.exp(-state.sq_distances / bandwidth)
    strength = torch.where(bandwidth > 0, strength, 0.0)
    # Σ_j C_ij (m_i - m_j) is unchanged by a shift of all particles: centred, the close ones keep their digits.
    laplacian = (torch.diag(strength.sum(dim=1)) - strength) / n
    centred = masks - masks.mean(dim=0)
    with torch.autocast(masks.device.type, enabled=False):  # which would multiply in two bytes
        force = laplacian.to(masks.dtype) @ centred
    return force * saliency.square() if kernel == "weighted_rbf" and saliency is not None else force


def _retract_(masks: Tensor, sizes: Tensor | None, density: str, target_density: float) -> None:
    """Scale every row so that its soft density is the target; a row of zeros stays."""
    ratio = target_density / _density(masks, sizes, density)
    factor = ratio if density == "l2" else ratio.sqrt()
    masks.mul_(torch.where(torch.isfinite(factor), factor, 1.0).to(masks.dtype)[:, None])


def transition_(
    masks: Tensor,  # (n, d), moved in place
    grads: Tensor,  # (n, d), or (1, d) with only
    weights: Tensor | None,  # (d,)
    saliency: Tensor | None,  # (d,)
    sizes: Tensor | None,  # (d,)
    residual: Tensor | None,  # (n, d)
    state: TransitionStats | None,
    *,
    step: float,
    radius: float,
    repulsion: float,
    kernel: str,
    density: str,
    target_density: float | None,
    consensus: float,
    eps: float,
    key: int,
    skip: bool,
    only: int,
) -> TransitionStats:
    """One step of every particle, all reading the old positions; see :func:`sfpk_kernels.ops.transition_`."""
    particles = rounding.read(masks, residual)
    n, dtype = masks.shape[0], particles.dtype
    weights, saliency, sizes = (t if t is None else t.to(dtype) for t in (weights, saliency, sizes))
    held = torch.full((n,), only >= 0, dtype=torch.bool, device=masks.device)
    held[max(only, 0)] = False
    descent = -grads.to(dtype)
    if weights is not None:
        descent = descent * weights
    if only >= 0:
        descent = torch.where(held[:, None], 0.0, descent)
    descent_norm = _sum(descent.square()).sqrt()
    bad = ~torch.isfinite(descent_norm)
    skipped = bad | held
    if not skip:
        skipped |= bad.any()  # one bad gradient, and nothing moves
    descent[skipped], descent_norm[skipped] = 0.0, 0.0
    if state is None:
        state = measure(particles, saliency, sizes, kernel, density)

    g = descent
    if repulsion > 0 and n > 1:
        g = g + repulsion * _repulsion(particles, state, saliency, kernel)

    # ∇s = -c ⊙ m · (1 / (D ρ) for l2, 2 / D for l2_squared)
    total = float(masks.shape[1]) if sizes is None else _sum(sizes)
    scale = 1.0 / (total * state.densities) if density == "l2" else 2.0 / total
    slope_norm = state.slope_norms * scale  # ‖s‖
    alive = slope_norm > 0
    stays = skipped | ~alive  # a row of zeros has no direction: it is held like one that is skipped
    to_unit = torch.where(alive, -1.0 / state.slope_norms, 0.0).to(dtype)[:, None]
    unit = (particles if sizes is None else particles * sizes) * to_unit  # ŝ

    u = g - _sum(unit * g).to(dtype)[:, None] * unit
    u_norm, g_norm = _sum(u.square()).sqrt(), _sum(g.square()).sqrt()
    pace = slope_norm * u_norm if eps == 0 else ((slope_norm * u_norm).square() + eps).sqrt()
    tangential = torch.where(u_norm > TANGENT_TOLERANCE * g_norm, math.sqrt(radius**2 - 1) / pace, 0.0)
    radial = torch.where(alive, step / slope_norm, 0.0)
    tangential = torch.where(alive, step * tangential, 0.0)
    move = radial.to(dtype)[:, None] * unit + tangential.to(dtype)[:, None] * u
    product = descent_norm * _sum(move.square()).sqrt()
    cosines = torch.where(product > 0, _sum(move * descent) / product, 0.0)

    moved = particles + move
    if target_density is not None:
        _retract_(moved, sizes, density, target_density)
    moved[stays] = particles[stays]
    if consensus > 0 and n > 1:
        moved.lerp_(moved.mean(dim=0, keepdim=True).expand_as(moved), consensus)
        if target_density is not None:
            _retract_(moved, sizes, density, target_density)

    if masks.dtype in rounding.TWO_BYTES:
        kept = [(t, t[stays]) for t in (masks, residual) if t is not None]
        rounding.write_(moved, masks, residual, key)
        for stored, rows in kept:
            stored[stays] = rows
    else:
        moved[stays] = particles[stays]
        masks.copy_(moved)
    stats = measure(rounding.read(masks, residual), saliency, sizes, kernel, density)
    return stats._replace(cosines=cosines.masked_fill(skipped, 0.0).masked_fill(bad, float("nan")))

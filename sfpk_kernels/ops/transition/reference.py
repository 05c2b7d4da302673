"""The projected transition in plain PyTorch: the ground truth every other backend is compared with.

Elementwise arithmetic runs in the dtype of ``masks`` (fp32 for two-byte ones), every sum over coordinates in fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..codes import TANGENT_TOLERANCE
from . import rounding
from .spec import Columns, Step, TransitionSpec, TransitionStats


def sum_of(values: Tensor) -> Tensor:
    """Over coordinates, in fp64."""
    return values.sum(dim=-1, dtype=torch.float64)


def _density(masks: Tensor, sizes: Tensor | None, spec: TransitionSpec) -> Tensor:
    """ρ(m_i) (n,): sqrt(Σ c m² / D) for "l2", Σ c m² / D for "l2_squared"."""
    squares = masks.square() if sizes is None else masks.square() * sizes
    total = float(masks.shape[1]) if sizes is None else sum_of(sizes)
    share = sum_of(squares) / total
    return share if spec.squared else share.sqrt()


def measure(
    masks: Tensor,  # (n, d)
    columns: Columns,
    spec: TransitionSpec,
) -> TransitionStats:
    """The statistics of particles that have not moved yet (cosines are zero)."""
    n, saliency, sizes = masks.shape[0], columns.saliency if spec.weighted else None, columns.sizes
    zeros = masks.new_zeros(n, dtype=torch.float64)
    distances = masks.new_zeros((n, n), dtype=torch.float64)
    for i in range(n):
        squares = (masks - masks[i]).square()
        distances[i] = sum_of(squares if saliency is None else squares * saliency.square())
    norms = sum_of(masks.square()).sqrt()
    return TransitionStats(
        densities=_density(masks, sizes, spec),
        norms=norms,
        slope_norms=norms.clone() if sizes is None else sum_of((masks * sizes).square()).sqrt(),
        saliency_norms=zeros if saliency is None else sum_of(masks.square() * saliency),
        sq_distances=distances,
        cosines=zeros.clone(),
    )


def descent_of(
    masks: Tensor,  # (n, d), in the dtype to compute in
    grads: Tensor,  # (n, d), or (1, d) with spec.only
    columns: Columns,
    spec: TransitionSpec,
) -> Tensor:  # (n, d)
    """-∂L/∂m, zeros for particles that are held."""
    descent = -grads.to(masks.dtype)
    if columns.weights is not None:
        descent = descent * columns.weights
    return descent if spec.only < 0 else torch.where(held(len(masks), spec, masks.device)[:, None], 0.0, descent)


def held(n: int, spec: TransitionSpec, device: torch.device) -> Tensor:  # (n,) bool
    """Which particles do not move, as another one does."""
    return (torch.arange(n, dtype=torch.int64, device=device) != spec.only) & (spec.only >= 0)


def repulsion_of(
    masks: Tensor,  # (n, d)
    state: TransitionStats,
    columns: Columns,
    spec: TransitionSpec,
    d: int,  # coordinates of all shards together
) -> Tensor:  # (n, d)
    """(λ/n) Σ_j (2 κ_ij / h_ij) w ⊙ (m_i - m_j), along which the mean kernel value falls."""
    if spec.weighted:
        bandwidth = (state.saliency_norms[:, None] * state.saliency_norms[None, :]).sqrt()
    else:
        bandwidth = torch.full_like(state.sq_distances, float(d))
    strength = 2.0 / bandwidth * torch.exp(-state.sq_distances / bandwidth)
    strength = torch.where(bandwidth > 0, strength, 0.0)
    # Σ_j C_ij (m_i - m_j) is unchanged by a shift of all particles: centred, the close ones keep their digits.
    laplacian = (torch.diag(strength.sum(dim=1)) - strength) / masks.shape[0]
    centred = masks - masks.mean(dim=0)
    with torch.autocast(masks.device.type, enabled=False):  # which would multiply in two bytes
        force = laplacian.to(masks.dtype) @ centred
    saliency = columns.saliency if spec.weighted else None
    return spec.repulsion * (force if saliency is None else force * saliency.square())


def _retract_(masks: Tensor, sizes: Tensor | None, spec: TransitionSpec) -> None:
    """Scale every row so that its soft density is the target; a row of zeros stays."""
    assert spec.target_density is not None
    ratio = spec.target_density / _density(masks, sizes, spec)
    factor = ratio.sqrt() if spec.squared else ratio
    masks.mul_(torch.where(torch.isfinite(factor), factor, 1.0).to(masks.dtype)[:, None])


def transition_(step: Step) -> TransitionStats:
    """One step of every particle, all reading the old positions; see :func:`sfpk_kernels.ops.transition_`."""
    masks, grads, spec, columns, residual, state = step
    particles = rounding.read(masks, residual)
    (n, d), dtype = masks.shape, particles.dtype
    columns = Columns(*(t if t is None else t.to(dtype) for t in columns))
    sizes = columns.sizes
    descent = descent_of(particles, grads, columns, spec)
    descent_norm = sum_of(descent.square()).sqrt()
    bad = ~torch.isfinite(descent_norm)
    skipped = bad | held(n, spec, masks.device)
    if not spec.skip:
        skipped |= bad.any()  # one bad gradient, and nothing moves
    descent[skipped], descent_norm[skipped] = 0.0, 0.0
    if state is None:
        state = measure(particles, columns, spec)

    g = descent
    if spec.repels(n):
        g = g + repulsion_of(particles, state, columns, spec, d)

    # ∇s = -c ⊙ m · (1 / (D ρ) for l2, 2 / D for l2_squared)
    total = float(d) if sizes is None else sum_of(sizes)
    scale = 2.0 / total if spec.squared else 1.0 / (total * state.densities)
    slope_norm = state.slope_norms * scale  # ‖s‖
    alive = slope_norm > 0
    stays = skipped | ~alive  # a row of zeros has no direction: it is held like one that is skipped
    to_unit = torch.where(alive, -1.0 / state.slope_norms, 0.0).to(dtype)[:, None]
    unit = (particles if sizes is None else particles * sizes) * to_unit  # ŝ

    u = g - sum_of(unit * g).to(dtype)[:, None] * unit
    u_norm, g_norm = sum_of(u.square()).sqrt(), sum_of(g.square()).sqrt()
    pace = slope_norm * u_norm if spec.eps == 0 else ((slope_norm * u_norm).square() + spec.eps).sqrt()
    tangential = torch.where(u_norm > TANGENT_TOLERANCE * g_norm, spec.reach / pace, 0.0)
    radial = torch.where(alive, spec.step / slope_norm, 0.0)
    move = radial.to(dtype)[:, None] * unit
    by = spec.step if spec.angle is None else slope_norm * sum_of((particles + move).square()).sqrt()
    tangential = torch.where(alive, by * tangential, 0.0)
    move = move + tangential.to(dtype)[:, None] * u
    product = descent_norm * sum_of(move.square()).sqrt()
    cosines = torch.where(product > 0, sum_of(move * descent) / product, 0.0)

    moved = particles + move
    if spec.target_density is not None:
        _retract_(moved, sizes, spec)
    moved[stays] = particles[stays]
    if spec.pulls(n):
        moved.lerp_(moved.mean(dim=0, keepdim=True).expand_as(moved), spec.consensus)
        if spec.target_density is not None:
            _retract_(moved, sizes, spec)
    rounding.write_(moved, masks, residual, stays, spec.key)
    stats = measure(rounding.read(masks, residual), columns, spec)
    return stats._replace(cosines=cosines.masked_fill(skipped, 0.0).masked_fill(bad, float("nan")))

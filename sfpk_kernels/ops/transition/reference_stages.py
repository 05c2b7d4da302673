"""The stages of the transition in plain PyTorch, on any device and for every dtype of particles.

The algebra is that of csrc/cpu/transition_algebra.cpp: m' = f (m + α s + b u), u = g - slope s, s = c ⊙ m, with sums
of u = g - lean s in place of g. Nothing here waits for a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..codes import TANGENT_TOLERANCE
from . import rounding
from .reference import descent_of, held, repulsion_of, sum_of
from .spec import Columns, Shard, Step, TransitionSpec, TransitionStats


def measure(masks: Tensor, columns: Columns, residual: Tensor | None, spec: TransitionSpec) -> Tensor:
    """Sums (4 + n, n) of the particles as they are; see :func:`.stages.measure`."""
    particles = rounding.read(masks, residual)
    _, saliency, sizes = _cast(columns, particles.dtype)
    squares, apart = particles.square(), particles - particles[:1]
    own = sum_of(squares)
    by_saliency = torch.zeros_like(own)
    if spec.weighted and saliency is not None:
        by_saliency, apart = sum_of(saliency * squares), saliency * apart
    by_size = (own, own) if sizes is None else (sum_of(sizes * squares), sum_of(sizes.square() * squares))
    return torch.cat([torch.stack([own, *by_size, by_saliency]), _products(apart, apart)])


def sample(step: Step, shard: Shard) -> Tensor:
    """Sums (2, n) of all columns; see :func:`.stages.sample`."""
    _, _, g, s, sizes = _rows(step, shard)
    return torch.stack([sum_of(_by(sizes, s) * g), sum_of(_by(sizes, s) * s)])


def sums(step: Step, shard: Shard, sample: Tensor) -> Tensor:
    """Sums (8, n) or (8 + 6n, n) of the gradients, from the sample's (2, n); see :func:`.stages.sums`."""
    particles, e, g, s, sizes = _rows(step, shard)
    u = g - lean_of(sample).to(g.dtype)[:, None] * s
    if step.spec.only >= 0:
        u = torch.where(held(len(u), step.spec, u.device)[:, None], 0.0, u)
    cs, cu = _by(sizes, s), _by(sizes, u)
    rows = torch.stack([sum_of(x * y) for x, y in ((e, e), (e, s), (e, u), (u, u), (u, s), (cu, u), (cs, u), (cs, s))])
    if not step.spec.retracts_after_pull(len(particles)):
        return rows
    grams = [_products(particles, s), _products(s, u), _products(u, cu)]
    grams += (
        [torch.zeros_like(grams[0])] * 3 if sizes is None else [_products(x, y) for x, y in ((s, s), (cs, u), (cs, s))]
    )
    return torch.cat([rows, *grams])


def plan(
    state: TransitionStats, sample: Tensor, sums: Tensor, spec: TransitionSpec, shard: Shard
) -> tuple[Tensor, Tensor]:
    """Coefficients (6, n) of the move, and its cosines (n,); see :func:`.stages.plan`."""
    ee, es, eu, uu, us, cuu, csu, css = sums[:8]
    n, sized, total = sums.shape[1], shard.total is not None, _total(shard)
    fixed = held(n, spec, sums.device)
    bad = torch.isfinite(sums[:8].sum(dim=0)).logical_not() & fixed.logical_not()
    skipped = bad | fixed | (state.slope_norms > 0).logical_not()  # a row of zeros has no direction
    if not spec.skip:
        skipped |= bad.any()  # one bad gradient, and nothing moves

    def moving(value: Tensor, otherwise: float = 0.0) -> Tensor:
        return torch.where(skipped, otherwise, value)

    norm = moving(state.slope_norms, 1.0)
    ss = norm.square()
    scale = 2.0 / total if spec.squared else 1.0 / (total * moving(state.densities, 1.0))
    slope_norm = norm * scale  # ‖∇s‖
    rest = moving(us / ss)  # what the guess left over
    u_square = moving(uu - us * rest).clamp_min(0.0)
    slope = moving(lean_of(sample).double() + rest)
    u_norm, g_norm = u_square.sqrt(), (u_square + slope.square() * ss).sqrt()
    divisor = slope_norm * u_norm if spec.eps == 0 else (slope_norm.square() * u_square + spec.eps).sqrt()
    alpha = moving(-spec.step / slope_norm / norm)
    c_mm = total * (state.densities if spec.squared else state.densities.square())
    by: Tensor | float = spec.step
    if spec.angle is not None:  # ‖m + alpha s‖, as ‖∇s‖ is taken out again
        by = slope_norm * (state.norms.square() + 2 * alpha * c_mm + alpha.square() * ss).clamp_min(0.0).sqrt()
    b = moving(torch.where(u_norm > TANGENT_TOLERANCE * g_norm, by * spec.reach / divisor, 0.0))
    length = (alpha.square() * ss + b.square() * u_square).sqrt()
    cosines = (alpha * es + b * (eu - rest * es)) / (length * ee.sqrt())
    cosines = moving(torch.where((length > 0) & (ee > 0), cosines, 0.0)).masked_fill(bad, float("nan"))

    factor = torch.ones_like(norm)
    if spec.target_density is not None:
        if sized:
            uu_c, su_c = cuu - 2 * rest * csu + rest.square() * css, csu - rest * css
            moved = c_mm + 2 * alpha * ss + alpha.square() * css + 2 * alpha * b * su_c + b.square() * uu_c
        else:
            moved = c_mm * (1 + alpha).square() + b.square() * u_square
        factor = moving(_finite((_wanted(spec, total) / moved).sqrt(), 1.0), 1.0)
    keep = factor - 1.0 if sized else factor * (1.0 + alpha) - 1.0
    radial = factor * alpha if sized else torch.zeros_like(alpha)
    after_pull = torch.zeros_like(alpha)
    if spec.retracts_after_pull(n):
        square = _pulled_squares(state, sums[8:].view(6, n, n), alpha - b * rest, b, factor, spec, sized)
        after_pull = _finite((_wanted(spec, total) / square).sqrt() - 1.0, 0.0)
    rows = [slope, keep, radial, factor * b, after_pull, skipped.double()]
    return torch.stack(rows), cosines


def _pulled_squares(
    state: TransitionStats,
    grams: Tensor,  # (6, n, n)
    radial: Tensor,  # (n,) y_i = f_i (m_i + radial_i s_i + b_i u_i)
    b: Tensor,  # (n,)
    factor: Tensor,  # (n,) f
    spec: TransitionSpec,
    sized: bool,
) -> Tensor:  # (n,)
    """Σ c x² of x_i = (1 - η) y_i + η mean(y), from the Gram matrices of the sums."""
    mm, mu, uu, sm, su, ss = grams
    mm, uu, sm, ss = (_mirrored(t) for t in (mm, uu, sm, ss))

    def times(coefficient: Tensor, value: Tensor) -> Tensor:
        """A particle without a tangential part may be one whose u is not finite."""
        return torch.where(coefficient == 0, 0.0, coefficient * value)

    gi, gj, bi, bj = radial[:, None], radial[None, :], b[:, None], b[None, :]
    if sized:
        value = mm + (gi + gj) * sm + gi * gj * ss
        value = value + times(bj, mu + gi * su) + times(bi, mu.T + gj * su.T)
    else:
        if not spec.weighted:  # then the inner products follow from the norms and distances
            norms = state.norms.square()
            mm = 0.5 * (norms[:, None] + norms[None, :] - state.sq_distances)
        value = (1 + gi) * (1 + gj) * mm + times((1 + gi) * bj, mu) + times((1 + gj) * bi, mu.T)
    y = factor[:, None] * factor[None, :] * (value + times(bi * bj, uu))
    with_mean, pull = y.mean(dim=1), spec.consensus
    return (1 - pull) ** 2 * y.diagonal() + 2 * (1 - pull) * pull * with_mean + pull**2 * with_mean.mean()


def apply_(step: Step, shard: Shard, coefficients: Tensor) -> Tensor:
    """Move the particles by coefficients (6, n); sums (4 + n, n) of the moved ones; see :func:`.stages.apply_`."""
    particles, _, g, s, _ = _rows(step, shard)
    high = coefficients.to(particles.dtype)
    slope, keep, radial, tangential, after_pull, skipped = high[:, :, None]
    slope_low = (coefficients[0] - high[0].double()).to(particles.dtype)[:, None]
    stays = skipped[:, 0] > 0
    u = (g - slope * s) - slope_low * s
    moved = particles + (keep * particles + radial * s + tangential * u)
    moved = torch.where(stays[:, None], particles, moved)
    if step.spec.pulls(len(particles)):
        pulled = moved + step.spec.consensus * (moved.mean(dim=0) - moved)
        moved = pulled + after_pull * pulled
    rounding.write_(moved, step.masks, step.residual, stays, step.spec.key, shard.first_column)
    return measure(step.masks, step.columns, step.residual, step.spec)


def stats(
    sums: Tensor,  # (4 + n, n)
    spec: TransitionSpec,
    shard: Shard,
) -> tuple[Tensor, ...]:
    """TransitionStats without its cosines; see :func:`.stages.stats`."""
    own, by_size, by_size_square, by_saliency = sums[:4]
    share = by_size / _total(shard)
    gram = sums[4:]
    square = gram.diagonal()
    distances = (square[:, None] + square[None, :] - 2.0 * gram).clamp_min(0.0).triu(1)
    return (
        share if spec.squared else share.sqrt(),
        own.sqrt(),
        by_size_square.sqrt(),
        by_saliency.clone() if spec.weighted else torch.zeros_like(own),
        distances + distances.T,
    )


def _rows(step: Step, shard: Shard) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """The particles, e = -∂L/∂m, g = e + repulsion, s = c ⊙ m, (n, d) each, and c."""
    particles = rounding.read(step.masks, step.residual)
    columns, spec = _cast(step.columns, particles.dtype), step.spec
    descent = descent_of(particles, step.grads, columns, spec)
    g = descent
    if spec.repels(len(particles)):
        assert step.state is not None
        g = g + repulsion_of(particles, step.state, columns, spec, shard.d)
    return particles, descent, g, _by(columns.sizes, particles), columns.sizes


def _cast(columns: Columns, dtype: torch.dtype) -> Columns:
    return Columns(*(t if t is None else t.to(dtype) for t in columns))


def _by(sizes: Tensor | None, values: Tensor) -> Tensor:
    return values if sizes is None else values * sizes


def lean_of(sample: Tensor) -> Tensor:  # (n,) fp32
    """How far g leans on s, the lean of its sums: the same number in every stage and backend, so rounded to fp32."""
    return _finite(sample[0] / sample[1], 0.0).float()


def _products(x: Tensor, y: Tensor) -> Tensor:  # (n, n)
    """Σ_e x_ie y_je."""
    return torch.stack([sum_of(x * row) for row in y], dim=1)


def _mirrored(matrix: Tensor) -> Tensor:
    """A symmetric matrix of which the upper triangle is step."""
    return matrix.triu() + matrix.triu(1).T


def _finite(values: Tensor, otherwise: float) -> Tensor:
    return torch.where(torch.isfinite(values), values, otherwise)


def _total(shard: Shard) -> Tensor | float:
    """D, the governed weights of all shards."""
    return float(shard.d) if shard.total is None else shard.total.reshape(())


def _wanted(spec: TransitionSpec, total: Tensor | float) -> Tensor | float:
    """Σ c m² at the target density."""
    assert spec.target_density is not None
    return total * (spec.target_density if spec.squared else spec.target_density**2)

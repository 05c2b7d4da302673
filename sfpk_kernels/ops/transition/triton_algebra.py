"""The n x n algebra of the Triton transition, in fp64: that of csrc/cpu/transition_algebra.cpp."""

from __future__ import annotations

import triton
import triton.language as tl

from .. import codes
from .triton_moves import AFTER, HIGH, KEEP, LOW, RADIAL, SKIPPED, TANGENTIAL

TANGENT_TOLERANCE = tl.constexpr(codes.TANGENT_TOLERANCE)
ROW_BLOCK = tl.constexpr(16)  # rows of an n x n matrix worked on at a time


@triton.jit
def double(high, low):
    """The fp64 number that came as two of fp32."""
    return tl.full([], high, tl.float64) + tl.full([], low, tl.float64)


@triton.jit
def prepare_mix(
    q, saliency_norms, mix, n, d_high, d_low, lambda_high, lambda_low, N: tl.constexpr, WEIGHTED: tl.constexpr
):  # fmt: skip
    """Repulsion as a mix of particles: (lambda / n) (2 / h_ij) kappa_ij as a graph Laplacian, fp32 (N, N)."""
    columns = tl.arange(0, N)
    strength_of = double(lambda_high, lambda_low) * 2.0 / n
    for first in range(0, N, ROW_BLOCK):
        rows = first + tl.arange(0, ROW_BLOCK)
        inside = (rows < n)[:, None] & (columns < n)[None, :]
        apart = tl.load(q + rows[:, None] * n + columns[None, :], mask=inside, other=0.0)
        h = tl.zeros([ROW_BLOCK, N], tl.float64) + double(d_high, d_low)
        if WEIGHTED:
            a = tl.load(saliency_norms + rows, mask=rows < n, other=0.0)
            b = tl.load(saliency_norms + columns, mask=columns < n, other=0.0)
            h = tl.sqrt(a[:, None] * b[None, :])
        fits = inside & (rows[:, None] != columns[None, :]) & (h > 0)
        strength = tl.where(fits, strength_of / tl.where(fits, h, 1.0) * tl.exp(-apart / tl.where(fits, h, 1.0)), 0.0)
        diagonal = tl.sum(strength, axis=1)
        value = tl.where(rows[:, None] == columns[None, :], diagonal[:, None], -strength)
        tl.store(mix + rows[:, None] * N + columns[None, :], value.to(tl.float32))


@triton.jit
def _times(coefficient, value):
    """A particle without a tangential part may be one whose u is not finite."""
    return tl.where(coefficient != 0, coefficient * value, 0.0)


@triton.jit
def plan_moves(
    densities, norms, slope_norms, q, sums, guess, moves, scratch, cosines, n, only,
    total, step, reach, eps, target, pull,
    N: tl.constexpr, SIZED: tl.constexpr, WEIGHTED: tl.constexpr, SQUARED: tl.constexpr, RETRACT: tl.constexpr,
    GRAMS: tl.constexpr, HAS_EPS: tl.constexpr, BY_ANGLE: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """From the sums of the reduce pass to the coefficients of the update pass; scratch: 4 N fp64."""
    rows = tl.arange(0, N)
    real = rows < n
    ee = tl.load(sums + rows)
    es = tl.load(sums + N + rows)
    eu = tl.load(sums + 2 * N + rows)
    uu = tl.load(sums + 3 * N + rows)
    us = tl.load(sums + 4 * N + rows)
    cuu = tl.load(sums + 5 * N + rows)
    csu = tl.load(sums + 6 * N + rows)
    css = tl.load(sums + 7 * N + rows)
    every = ee + es + eu + uu + us + cuu + csu + css
    held = (rows != only) & (only >= 0)
    bad = real & ~held & ~(tl.abs(every) < float("inf"))
    bad_rows = tl.sum(bad.to(tl.int32), axis=0)
    stays = bad | held
    if not SKIP:
        stays = stays | (bad_rows > 0)  # one bad gradient, and nothing moves
    lean = tl.load(guess + rows).to(tl.float64)
    norm = tl.load(slope_norms + rows, mask=real, other=0.0)
    density = tl.load(densities + rows, mask=real, other=0.0)
    stays = stays | (real & ~(norm > 0))  # a row of zeros has no direction: it is held like one that is skipped
    goes = real & ~stays
    norm = tl.where(goes, norm, 1.0)
    ss = norm * norm
    scale = tl.where(goes, 1.0 / (total * tl.where(goes, density, 1.0)), 1.0)
    if SQUARED:
        scale = tl.zeros([N], tl.float64) + 2.0 / total
    slope_norm = norm * scale
    rest = tl.where(goes, us / ss, 0.0)
    u_square = tl.maximum(tl.where(goes, uu - us * rest, 0.0), 0.0)
    slope = lean + rest
    u_norm = tl.sqrt(u_square)
    g_norm = tl.sqrt(u_square + slope * slope * ss)
    points = goes & (u_norm > g_norm * TANGENT_TOLERANCE)  # else it is noise, with eps, too
    divisor = slope_norm * u_norm
    if HAS_EPS:
        divisor = tl.sqrt(slope_norm * slope_norm * u_square + eps)
    alpha = tl.where(goes, -step / slope_norm / norm, 0.0)
    c_mm = density * density * total
    if SQUARED:
        c_mm = density * total
    by = step
    if BY_ANGLE:
        # ‖m + alpha s‖, of which ‖∇s‖ is taken out again.
        own = tl.load(norms + rows, mask=real, other=0.0)
        by = slope_norm * tl.sqrt(tl.maximum(own * own + 2 * alpha * c_mm + alpha * alpha * ss, 0.0))
    pace = tl.where(points, by * reach / tl.where(points, divisor, 1.0), 0.0)
    along = tl.where(goes, alpha * es + pace * (eu - rest * es), 0.0)
    length = tl.sqrt(alpha * alpha * ss + pace * pace * u_square)
    known = goes & (length > 0) & (ee > 0)
    cosine = tl.where(known, along / (tl.where(known, length, 1.0) * tl.sqrt(tl.where(known, ee, 1.0))), 0.0)
    tl.store(cosines + rows, tl.where(bad, float("nan"), cosine), mask=real)

    factor = tl.zeros([N], tl.float64) + 1.0
    if RETRACT:
        wanted = target * target * total
        if SQUARED:
            wanted = target * total
        if SIZED:
            uu_c = cuu - 2 * rest * csu + rest * rest * css
            moved = c_mm + 2 * alpha * ss + alpha * alpha * css
            moved += 2 * alpha * pace * (csu - rest * css) + pace * pace * uu_c
        else:
            moved = c_mm * (1 + alpha) * (1 + alpha) + pace * pace * u_square
        fits = goes & (moved > 0)
        factor = tl.where(fits, tl.sqrt(wanted / tl.where(fits, moved, 1.0)), 1.0)
    high = slope.to(tl.float32)
    tl.store(moves + HIGH * N + rows, tl.where(goes, high, 0.0))
    tl.store(moves + LOW * N + rows, tl.where(goes, (slope - high.to(tl.float64)).to(tl.float32), 0.0))
    if SIZED:
        keep = factor - 1.0
        tl.store(moves + RADIAL * N + rows, (factor * alpha).to(tl.float32))
    else:
        keep = factor * (1.0 + alpha) - 1.0
    tl.store(moves + KEEP * N + rows, keep.to(tl.float32))
    tl.store(moves + TANGENTIAL * N + rows, (factor * pace).to(tl.float32))
    tl.store(moves + AFTER * N + rows, tl.zeros([N], tl.float32))
    tl.store(moves + SKIPPED * N + rows, stays.to(tl.float32))
    if GRAMS:
        tl.store(scratch + rows, alpha - pace * rest)
        tl.store(scratch + N + rows, pace)
        tl.store(scratch + 2 * N + rows, factor)
        tl.debug_barrier()
        _plan_pull(norms, q, sums + 8 * N, moves, scratch, n, pull, wanted, stays, N, SIZED, WEIGHTED)


@triton.jit
def _plan_pull(
    norms, q, grams, moves, scratch, n, pull, wanted, stays,
    N: tl.constexpr, SIZED: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """What the pull to the mean takes from each norm, minus one: see scales_after_pull in transition_algebra.cpp."""
    square: tl.constexpr = N * N
    columns = tl.arange(0, N)
    gj = tl.load(scratch + columns)[None, :]
    bj = tl.load(scratch + N + columns)[None, :]
    fj = tl.load(scratch + 2 * N + columns)[None, :]
    mean_square = tl.full([], 0.0, tl.float64)
    for first in range(0, N, ROW_BLOCK):
        rows = first + tl.arange(0, ROW_BLOCK)
        inside = (rows < n)[:, None] & (columns < n)[None, :]
        gi = tl.load(scratch + rows)[:, None]
        bi = tl.load(scratch + N + rows)[:, None]
        fi = tl.load(scratch + 2 * N + rows)[:, None]
        ij = rows[:, None] * N + columns[None, :]
        ji = columns[None, :] * N + rows[:, None]
        mu_ij = tl.load(grams + square + ij)
        mu_ji = tl.load(grams + square + ji)
        uu = tl.load(grams + 2 * square + ij)
        if SIZED or WEIGHTED:
            mm = tl.load(grams + ij)
        else:
            # Unweighted, the inner products follow from the norms and distances of the state.
            own = tl.load(norms + rows, mask=rows < n, other=0.0)[:, None]
            other = tl.load(norms + columns, mask=columns < n, other=0.0)[None, :]
            apart = tl.load(q + rows[:, None] * n + columns[None, :], mask=inside, other=0.0)
            mm = 0.5 * (own * own + other * other - apart)
        if SIZED:
            su_ij = tl.load(grams + 4 * square + ij)
            su_ji = tl.load(grams + 4 * square + ji)
            value = mm + (gi + gj) * tl.load(grams + 3 * square + ij) + gi * gj * tl.load(grams + 5 * square + ij)
            value += _times(bj, mu_ij + gi * su_ij) + _times(bi, mu_ji + gj * su_ji) + _times(bi * bj, uu)
        else:
            value = (1 + gi) * (1 + gj) * mm
            value += _times((1 + gi) * bj, mu_ij) + _times((1 + gj) * bi, mu_ji) + _times(bi * bj, uu)
        y = tl.where(inside, fi * fj * value, 0.0)
        with_mean = tl.sum(y, axis=1) / n
        mean_square += tl.sum(with_mean, axis=0) / n
        tl.store(scratch + N * 3 + rows, with_mean)
        own_square = tl.sum(tl.where(rows[:, None] == columns[None, :], y, 0.0), axis=1)
        tl.store(scratch + N * 4 + rows, own_square)
    tl.debug_barrier()
    with_mean = tl.load(scratch + 3 * N + columns)
    own_square = tl.load(scratch + 4 * N + columns)
    stay = 1.0 - pull
    norm_square = stay * stay * own_square + 2 * stay * pull * with_mean + pull * pull * mean_square
    fits = (columns < n) & ~stays & (norm_square > 0)
    again = tl.where(fits, tl.sqrt(wanted / tl.where(fits, norm_square, 1.0)) - 1.0, 0.0)
    tl.store(moves + AFTER * N + columns, again.to(tl.float32))


@triton.jit
def plan_rescale(sums, moves, n, total, target, N: tl.constexpr, SQUARED: tl.constexpr):
    """The factor that brings particles, as just measured, onto the target density."""
    rows = tl.arange(0, N)
    c_mm = tl.load(sums + N + rows)
    wanted = target * target * total
    if SQUARED:
        wanted = target * total
    stays = tl.load(moves + SKIPPED * N + rows) > 0
    fits = (rows < n) & ~stays & (c_mm > 0)
    keep = tl.where(fits, tl.sqrt(wanted / tl.where(fits, c_mm, 1.0)) - 1.0, 0.0)
    tl.store(moves + KEEP * N + rows, keep.to(tl.float32))


@triton.jit
def finish_statistics(
    sums, densities, norms, slope_norms, saliency_norms, q, n, total, N: tl.constexpr, SQUARED: tl.constexpr
):  # fmt: skip
    """The statistics of the particles from the sums of an update pass."""
    rows = tl.arange(0, N)
    real = rows < n
    share = tl.load(sums + N + rows) / total
    if not SQUARED:
        share = tl.sqrt(share)
    tl.store(densities + rows, share, mask=real)
    tl.store(norms + rows, tl.sqrt(tl.load(sums + rows)), mask=real)
    tl.store(slope_norms + rows, tl.sqrt(tl.load(sums + 2 * N + rows)), mask=real)
    tl.store(saliency_norms + rows, tl.load(sums + 3 * N + rows), mask=real)
    gram = sums + 4 * N
    other = tl.load(gram + rows * N + rows)[None, :]
    for first in range(0, N, ROW_BLOCK):
        part = first + tl.arange(0, ROW_BLOCK)
        own = tl.load(gram + part * N + part)[:, None]
        inner = tl.load(gram + part[:, None] * N + rows[None, :])
        apart = tl.where(part[:, None] == rows[None, :], 0.0, tl.maximum(own + other - 2 * inner, 0.0))
        tl.store(q + part[:, None] * n + rows[None, :], apart, mask=(part < n)[:, None] & real[None, :])

"""The fused transition as Triton kernels: one program owns a tile of columns of all n particles.

A step is five launches of :func:`transition`, by STAGE, without a host synchronisation in between::

    prepare  (1 program)   the repulsion as an (n, n) mix of particles; from a sample, how far g leans on the slope
    reduce   (slots)       reads M and G: sums of every slot of columns
    plan     (1 program)   the n x n algebra in fp64: one set of coefficients per particle
    update   (slots)       reads M and G, writes M; sums of the moved particles, for the next step
    finish   (1 program)   the statistics of the moved particles

with ``combine`` behind each pass that has more than one slot. Few coordinates run as one launch (``whole``).

Sums run in fp32 over at most 4,096 columns (512 of a thread where it owns them), in fp64 beyond. Columns are cut into
slots by n and d alone, slots are added in order: the same bits on every device of a kind, and no atomics.

For few particles the two passes run by columns (triton_columns.py), else by tiles with matrix products (here).
The algebra is that of csrc/cpu/transition_algebra.cpp: m' = f (m + alpha s + b u), u = g - slope s, s = c m.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import codes
from .._triton_bfloat16 import round_to_bfloat16
from .triton_columns import clear, reduce_columns, update_columns
from .triton_rounding import random_bits, round_to_half

# (In products the tensor stands first: constant * tensor is a constant to the interpreters of Triton 3.7 and 3.8.)
SAMPLED_TILES = tl.constexpr(16)
TANGENT_TOLERANCE = tl.constexpr(codes.TANGENT_TOLERANCE)
DISTANCE_ROWS = tl.constexpr(64)  # particles of a block of the stage "distances"
ROW_BLOCK = tl.constexpr(16)  # rows of an n x n matrix worked on at a time

# Offsets of the coefficients, in units of N.
HIGH = tl.constexpr(0)
LOW = tl.constexpr(1)
KEEP = tl.constexpr(2)
RADIAL = tl.constexpr(3)
TANGENTIAL = tl.constexpr(4)
AFTER = tl.constexpr(5)
SKIPPED = tl.constexpr(6)


@triton.jit
def _double(high, low):
    return tl.full([], high, tl.float64) + tl.full([], low, tl.float64)


@triton.jit
def _tile(pointer, stride, rows, columns, n, end):
    """(rows, columns) of a matrix as fp32, zeros outside."""
    inside = (rows < n)[:, None] & (columns < end)[None, :]
    return tl.load(pointer + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=inside, other=0.0).to(
        tl.float32
    )


@triton.jit
def _particles(masks, mask_stride, residual, residual_stride, rows, columns, n, end):
    m = _tile(masks, mask_stride, rows, columns, n, end)
    if residual is not None:
        m += _tile(residual, residual_stride, rows, columns, n, end)
    return m


@triton.jit
def _vector(pointer, columns, end):
    return tl.load(pointer + columns, mask=columns < end, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _dot(a, b):
    """In plain fp32: tensor cores would round the operands, or take three products and the registers of them."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _centred(m, rows, n):
    """The tile minus its mean particle; rows beyond n stay zero. Particles are close: their differences are not."""
    mean = tl.sum(m, axis=0) / n
    return tl.where((rows < n)[:, None], m - mean[None, :], 0.0)


@triton.jit
def _force(
    m, mix, masks, mask_stride, residual, residual_stride, rows, columns, n, end,
    N: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """mix @ (tile minus its mean), over PART particles at a time: those of a large n are read again, from the cache."""
    if N == PART:
        mixes = tl.load(mix + rows[:, None] * N + rows[None, :])
        force = _dot(mixes, _centred(m, rows, n))
    else:
        mean = tl.sum(m, axis=0) / n
        force = tl.zeros_like(m)
        for first in range(0, N, PART):
            part = first + tl.arange(0, PART)
            others = _particles(masks, mask_stride, residual, residual_stride, part, columns, n, end)
            mixes = tl.load(mix + rows[:, None] * N + part[None, :])
            force += _dot(mixes, others - mean[None, :])
    return force


@triton.jit
def _descent(
    m, grads, grad_stride, weights, saliency, mix, masks, mask_stride, residual, residual_stride, rows, columns, n, end,
    N: tl.constexpr, PART: tl.constexpr, WEIGHTED: tl.constexpr, REPEL: tl.constexpr,
):  # fmt: skip
    """e = -dL/dm and g = e + w * repulsion of one tile."""
    e = -_tile(grads, grad_stride, rows, columns, n, end)
    if weights is not None:
        e *= _vector(weights, columns, end)
    g = e
    if REPEL:
        force = _force(
            m, mix, masks, mask_stride, residual, residual_stride, rows, columns, n, end, N, PART
        )  # fmt: skip
        if WEIGHTED:
            a = _vector(saliency, columns, end)
            force *= a * a
        g += force
    return e, g


@triton.jit
def _add_matrix(pointer, values, N: tl.constexpr):
    """Add an (N, N) fp32 tile to fp64 memory that this program alone writes."""
    at = pointer + tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(at, tl.load(at) + values.to(tl.float64))


@triton.jit
def _reduce(
    masks, mask_stride, residual, residual_stride, grads, grad_stride, weights, saliency, sizes, mix, guess,
    sums, begin, stop, hop, end, n,
    N: tl.constexpr, B: tl.constexpr, PART: tl.constexpr, FLUSH: tl.constexpr, WEIGHTED: tl.constexpr,
    REPEL: tl.constexpr, GRAMS: tl.constexpr,
):  # fmt: skip
    """sums (8 + grams) of tiles at begin, begin + hop, … < stop; columns from ``end`` on do not count."""
    rows = tl.arange(0, N)
    square: tl.constexpr = N * N
    lean = tl.zeros([N], tl.float32)
    if guess is not None:
        lean = tl.load(guess + rows)
    ee = tl.zeros([N], tl.float64)
    es, eu, uu, us = ee, ee, ee, ee
    cuu, csu, css = ee, ee, ee
    if GRAMS:
        clear(sums + 8 * N, (6 if sizes is not None else 3) * square)
    stretch = FLUSH * tl.full([], hop, tl.int64)
    for block in range(begin, stop, stretch):
        if GRAMS:
            g_mm = tl.zeros([N, N], tl.float32)
            g_mu, g_uu = g_mm, g_mm
            if sizes is not None:
                g_sm, g_su, g_ss = g_mm, g_mm, g_mm
        for at in range(block, tl.minimum(block + stretch, stop), hop):
            columns = at + tl.arange(0, B).to(tl.int64)
            m = _particles(masks, mask_stride, residual, residual_stride, rows, columns, n, end)
            e, g = _descent(
                m, grads, grad_stride, weights, saliency, mix, masks, mask_stride, residual, residual_stride,
                rows, columns, n, end, N, PART, WEIGHTED, REPEL,
            )  # fmt: skip
            s = m
            if sizes is not None:
                s = m * _vector(sizes, columns, end)
            u = g - lean[:, None] * s
            ee += tl.sum(e * e, axis=1).to(tl.float64)
            es += tl.sum(e * s, axis=1).to(tl.float64)
            eu += tl.sum(e * u, axis=1).to(tl.float64)
            uu += tl.sum(u * u, axis=1).to(tl.float64)
            us += tl.sum(u * s, axis=1).to(tl.float64)
            if sizes is not None:
                c = _vector(sizes, columns, end)
                cuu += tl.sum(c * u * u, axis=1).to(tl.float64)
                csu += tl.sum(c * s * u, axis=1).to(tl.float64)
                css += tl.sum(c * s * s, axis=1).to(tl.float64)
            else:
                css += tl.sum(s * s, axis=1).to(tl.float64)
            if GRAMS:
                if sizes is not None:
                    c = _vector(sizes, columns, end)
                    g_mm += _dot(m, tl.trans(s))
                    g_mu += _dot(s, tl.trans(u))
                    g_uu += _dot(u, tl.trans(c * u))
                    g_sm += _dot(s, tl.trans(s))
                    g_su += _dot(c * s, tl.trans(u))
                    g_ss += _dot(c * s, tl.trans(s))
                else:
                    if WEIGHTED:
                        g_mm += _dot(m, tl.trans(m))
                    g_mu += _dot(m, tl.trans(u))
                    g_uu += _dot(u, tl.trans(u))
        if GRAMS:
            grams = sums + 8 * N
            _add_matrix(grams, g_mm, N)
            _add_matrix(grams + square, g_mu, N)
            _add_matrix(grams + 2 * square, g_uu, N)
            if sizes is not None:
                _add_matrix(grams + 3 * square, g_sm, N)
                _add_matrix(grams + 4 * square, g_su, N)
                _add_matrix(grams + 5 * square, g_ss, N)
    if sizes is None:
        csu = us
    tl.store(sums + rows, ee)
    tl.store(sums + N + rows, es)
    tl.store(sums + 2 * N + rows, eu)
    tl.store(sums + 3 * N + rows, uu)
    tl.store(sums + 4 * N + rows, us)
    tl.store(sums + 5 * N + rows, cuu)
    tl.store(sums + 6 * N + rows, csu)
    tl.store(sums + 7 * N + rows, css)


@triton.jit
def _update(
    masks, mask_stride, residual, residual_stride, grads, grad_stride, weights, saliency, sizes, mix, moves,
    sums, begin, stop, end, n, pull, key_low, key_high,
    N: tl.constexpr, B: tl.constexpr, PART: tl.constexpr, FLUSH: tl.constexpr, WEIGHTED: tl.constexpr,
    REPEL: tl.constexpr, PULL: tl.constexpr, MOVES: tl.constexpr, RESCALES: tl.constexpr, DISTANCES: tl.constexpr,
):  # fmt: skip
    """Move the particles (MOVES) or scale them (RESCALES), write them; sums (4 + gram) of what then lies there."""
    rows = tl.arange(0, N)
    mm = tl.zeros([N], tl.float64)
    cmm, ccmm, amm = mm, mm, mm
    if MOVES or RESCALES:
        keep = tl.load(moves + KEEP * N + rows)[:, None]
        skipped = (tl.load(moves + SKIPPED * N + rows) > 0)[:, None]
    if DISTANCES:
        clear(sums + 4 * N, N * N)
    for block in range(begin, stop, FLUSH * B):
        if DISTANCES:
            gram = tl.zeros([N, N], tl.float32)
        for at in range(block, tl.minimum(block + FLUSH * B, stop), B):
            columns = at + tl.arange(0, B).to(tl.int64)
            m = _particles(masks, mask_stride, residual, residual_stride, rows, columns, n, end)
            if MOVES or RESCALES:
                new = m + keep * m
                if MOVES:
                    _, g = _descent(
                        m, grads, grad_stride, weights, saliency, mix, masks, mask_stride, residual, residual_stride,
                        rows, columns, n, end, N, PART, WEIGHTED, REPEL,
                    )  # fmt: skip
                    s = m
                    if sizes is not None:
                        s = m * _vector(sizes, columns, end)
                    high = tl.load(moves + HIGH * N + rows)[:, None]
                    low = tl.load(moves + LOW * N + rows)[:, None]
                    tangential = tl.load(moves + TANGENTIAL * N + rows)[:, None]
                    u = (g - high * s) - low * s
                    move = keep * m + tangential * u
                    if sizes is not None:
                        move += tl.load(moves + RADIAL * N + rows)[:, None] * s
                    new = tl.where(skipped, m, m + move)  # the gradient of a skipped one may be NaN
                    if PULL:
                        after = tl.load(moves + AFTER * N + rows)[:, None]
                        mean = (tl.sum(new, axis=0) / n)[None, :]
                        pulled = new + pull * (mean - new)
                        new = tl.where(skipped, m, pulled + after * pulled)
                    if N != PART:
                        tl.debug_barrier()  # every warp has read the old particles
                inside = (rows < n)[:, None] & (columns < end)[None, :] & ~skipped
                to = masks + rows.to(tl.int64)[:, None] * mask_stride + columns[None, :]
                if residual is not None:
                    rounded = round_to_bfloat16(new)
                    rest = round_to_bfloat16(new - rounded)
                    tl.store(to, rounded.to(tl.bfloat16), mask=inside)
                    also = residual + rows.to(tl.int64)[:, None] * residual_stride + columns[None, :]
                    tl.store(also, rest.to(tl.bfloat16), mask=inside)
                    new = rounded + rest
                elif masks.dtype.element_ty == tl.float16:
                    new = round_to_half(new, random_bits(key_low, key_high, rows, columns))
                    tl.store(to, new.to(tl.float16), mask=inside)
                else:
                    tl.store(to, new, mask=inside)
                m = tl.where((rows < n)[:, None] & (columns < end)[None, :], tl.where(skipped, m, new), 0.0)
            squares = m * m
            mm += tl.sum(squares, axis=1).to(tl.float64)
            if sizes is not None:
                c = _vector(sizes, columns, end)
                cmm += tl.sum(c * squares, axis=1).to(tl.float64)
                ccmm += tl.sum(c * c * squares, axis=1).to(tl.float64)
            if WEIGHTED:
                amm += tl.sum(_vector(saliency, columns, end) * squares, axis=1).to(tl.float64)
            if DISTANCES:
                apart = _centred(m, rows, n)
                if WEIGHTED:
                    apart *= _vector(saliency, columns, end)
                gram += _dot(apart, tl.trans(apart))
        if DISTANCES:
            _add_matrix(sums + 4 * N, gram, N)
    if sizes is None:
        cmm = mm
        ccmm = mm
    tl.store(sums + rows, mm)
    tl.store(sums + N + rows, cmm)
    tl.store(sums + 2 * N + rows, ccmm)
    tl.store(sums + 3 * N + rows, amm)


@triton.jit
def _distances(
    masks, mask_stride, residual, residual_stride, saliency, gram, block_row, block_column, begin, stop, end, n,
    N: tl.constexpr, B: tl.constexpr, BLOCK: tl.constexpr, FLUSH: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """A (BLOCK, BLOCK) block of the Gram matrix of differences to particle 0, for n too large for one tile."""
    rows = block_row * BLOCK + tl.arange(0, BLOCK)
    others = block_column * BLOCK + tl.arange(0, BLOCK)
    at_gram = gram + rows[:, None] * N + others[None, :]
    total = tl.zeros([BLOCK, BLOCK], tl.float64)
    for block in range(begin, stop, FLUSH * B):
        part = tl.zeros([BLOCK, BLOCK], tl.float32)
        for at in range(block, tl.minimum(block + FLUSH * B, stop), B):
            columns = at + tl.arange(0, B).to(tl.int64)
            first = tl.load(masks + columns, mask=columns < end, other=0.0).to(tl.float32)
            if residual is not None:
                first += tl.load(residual + columns, mask=columns < end, other=0.0).to(tl.float32)
            x = _particles(masks, mask_stride, residual, residual_stride, rows, columns, n, end) - first[None, :]
            y = _particles(masks, mask_stride, residual, residual_stride, others, columns, n, end) - first[None, :]
            if WEIGHTED:
                a = _vector(saliency, columns, end)
                x *= a
                y *= a
            part += _dot(x, tl.trans(y))
        total += part.to(tl.float64)
    tl.store(at_gram, total)


@triton.jit
def _prepare_mix(
    q, saliency_norms, mix, n, d_high, d_low, lambda_high, lambda_low, N: tl.constexpr, WEIGHTED: tl.constexpr
):  # fmt: skip
    """Repulsion as a mix of particles: (lambda / n) (2 / h_ij) kappa_ij as a graph Laplacian, fp32 (N, N)."""
    columns = tl.arange(0, N)
    strength_of = _double(lambda_high, lambda_low) * 2.0 / n
    for first in range(0, N, ROW_BLOCK):
        rows = first + tl.arange(0, ROW_BLOCK)
        inside = (rows < n)[:, None] & (columns < n)[None, :]
        apart = tl.load(q + rows[:, None] * n + columns[None, :], mask=inside, other=0.0)
        h = tl.zeros([ROW_BLOCK, N], tl.float64) + _double(d_high, d_low)
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
def _plan(
    densities, norms, slope_norms, q, sums, guess, moves, scratch, cosines, n, only,
    total, step, root, eps, target, pull,
    N: tl.constexpr, SIZED: tl.constexpr, WEIGHTED: tl.constexpr, SQUARED: tl.constexpr, RETRACT: tl.constexpr,
    GRAMS: tl.constexpr, HAS_EPS: tl.constexpr, SKIP: tl.constexpr,
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
    pace = tl.where(points, step * root / tl.where(points, divisor, 1.0), 0.0)
    alpha = tl.where(goes, -step / slope_norm / norm, 0.0)
    along = tl.where(goes, alpha * es + pace * (eu - rest * es), 0.0)
    length = tl.sqrt(alpha * alpha * ss + pace * pace * u_square)
    known = goes & (length > 0) & (ee > 0)
    cosine = tl.where(known, along / (tl.where(known, length, 1.0) * tl.sqrt(tl.where(known, ee, 1.0))), 0.0)
    tl.store(cosines + rows, tl.where(bad, float("nan"), cosine), mask=real)

    factor = tl.zeros([N], tl.float64) + 1.0
    if RETRACT:
        c_mm = density * density * total
        wanted = target * target * total
        if SQUARED:
            c_mm = density * total
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
def _plan_rescale(sums, moves, n, total, target, N: tl.constexpr, SQUARED: tl.constexpr):
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
def _finish(
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


@triton.jit
def combine(slots, sums, count, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """sums (SIZE) = slots (count, SIZE) added in order."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for slot in range(0, count):
        total += tl.load(slots + slot * SIZE + at, mask=at < SIZE, other=0.0)
    tl.store(sums + at, total, mask=at < SIZE)


@triton.jit(do_not_specialize=["n", "chunk", "key_low", "key_high", "only"])
def transition(
    masks,  # (n, d) fp32, fp16 or bf16
    mask_stride,
    residual,  # (n, d) bf16, or None
    residual_stride,
    grads,  # (n, d), or None where nothing moves
    grad_stride,
    weights,  # (d,), or None
    saliency,
    sizes,
    total_of_sizes,  # fp64 scalar in memory with sizes, else None: D = d
    old_densities,  # fp64: the statistics before
    old_norms,
    old_slope_norms,
    old_saliency_norms,
    old_distances,
    densities,  # fp64: the statistics after
    norms,
    slope_norms,
    saliency_norms,
    distances,
    cosines,
    mix,  # (N, N) fp32
    guess,  # (N,) fp32
    moves,  # (7, N) fp32
    scratch,  # (5, N) fp64
    slots,  # (slots, SIZE) fp64
    sums,  # (SIZE,) fp64
    n,
    d,
    chunk,  # columns of a slot
    hop,  # columns between sampled tiles
    d_high,  # doubles in two floats: Triton passes floats as fp32
    d_low,
    step_high,
    step_low,
    root_high,
    root_low,
    lambda_high,
    lambda_low,
    eps_high,
    eps_low,
    target_high,
    target_low,
    pull_high,
    pull_low,
    key_low,
    key_high,
    only,  # the particle that moves, -1 for all
    STAGE: tl.constexpr,
    SIZE: tl.constexpr,  # sums of a slot
    N: tl.constexpr,  # particles, padded
    B: tl.constexpr,  # columns of a tile
    PART: tl.constexpr,  # particles at a time in products of n x n with n x B
    FLUSH: tl.constexpr,  # tiles summed in fp32
    WEIGHTED: tl.constexpr,
    SQUARED: tl.constexpr,
    RETRACT: tl.constexpr,
    REPEL: tl.constexpr,
    PULL: tl.constexpr,
    GRAMS: tl.constexpr,
    HAS_EPS: tl.constexpr,
    SKIP: tl.constexpr,
    DISTANCES: tl.constexpr,  # whether the update sums distances, else the stage "distances" does
    ROWS: tl.constexpr,  # n where the passes run by columns (triton_columns.py), else 0
):
    """One stage of a step, or with STAGE "whole" a step in one program; see the head of this file."""
    whole: tl.constexpr = STAGE == "whole"
    sized: tl.constexpr = sizes is not None
    d_wide = _double(d_high, d_low)
    total = d_wide
    if sizes is not None:
        total = tl.load(total_of_sizes)
    program = tl.program_id(0).to(tl.int64)
    begin = program * chunk
    stop = tl.minimum(begin + chunk, d)
    slot = slots + program * SIZE
    pull = _double(pull_high, pull_low)
    target = _double(target_high, target_low)

    if whole or STAGE == "prepare":
        if REPEL:
            _prepare_mix(
                old_distances, old_saliency_norms, mix, n, d_high, d_low, lambda_high, lambda_low, N, WEIGHTED
            )  # fmt: skip
            tl.debug_barrier()
        # A sample tells how far g leans on the slope; summing u = g - guess * s instead of g keeps the digits of
        # the norm of u when g is nearly parallel to s.
        sampled = tl.minimum(tl.full([], hop, tl.int64) * SAMPLED_TILES, d)
        if ROWS > 0:
            reduce_columns(
                masks, mask_stride, residual, residual_stride, grads, grad_stride, weights, saliency, mix, None,
                sums, tl.zeros([], tl.int64), sampled, hop, d, ROWS, N, B, WEIGHTED, REPEL, False,
            )  # fmt: skip
        else:
            _reduce(
                masks, mask_stride, residual, residual_stride, grads, grad_stride, weights, saliency, sizes, mix, None,
                sums, tl.zeros([], tl.int64), sampled, hop, d, n,
                N, B, PART, FLUSH, WEIGHTED, REPEL, False,
            )  # fmt: skip
        tl.debug_barrier()
        rows = tl.arange(0, N)
        below = tl.load(sums + 7 * N + rows)
        lean = tl.load(sums + 6 * N + rows) / tl.where(below > 0, below, 1.0)
        tl.store(guess + rows, tl.where((below > 0) & (tl.abs(lean) < 1e30), lean, 0.0).to(tl.float32))
        tl.debug_barrier()
    if whole or STAGE == "reduce":
        if ROWS > 0:
            reduce_columns(
                masks, mask_stride, residual, residual_stride, grads, grad_stride, weights, saliency, mix, guess,
                slot, begin, stop, B, d, ROWS, N, B, WEIGHTED, REPEL, GRAMS,
            )  # fmt: skip
        else:
            _reduce(
                masks, mask_stride, residual, residual_stride, grads, grad_stride, weights, saliency, sizes, mix, guess,
                slot, begin, stop, B, d, n, N, B, PART, FLUSH, WEIGHTED, REPEL, GRAMS,
            )  # fmt: skip
        tl.debug_barrier()
    if whole or STAGE == "plan":
        _plan(
            old_densities, old_norms, old_slope_norms, old_distances, sums, guess, moves, scratch, cosines, n, only,
            total, _double(step_high, step_low),
            _double(root_high, root_low), _double(eps_high, eps_low),
            target, pull,
            N, sized, WEIGHTED, SQUARED, RETRACT, GRAMS, HAS_EPS, SKIP,
        )  # fmt: skip
        tl.debug_barrier()
    if whole or STAGE == "update" or STAGE == "measure" or STAGE == "rescale":
        if ROWS > 0:
            update_columns(
                masks, mask_stride, residual, residual_stride, grads, grad_stride, weights, saliency, mix, moves,
                slot, begin, stop, d, pull_high, key_low, key_high,
                ROWS, N, B, WEIGHTED, REPEL, PULL, whole or STAGE == "update", STAGE == "rescale",
                HIGH, LOW, KEEP, TANGENTIAL, AFTER, SKIPPED,
            )  # fmt: skip
        else:
            _update(
                masks, mask_stride, residual, residual_stride, grads, grad_stride, weights, saliency, sizes, mix, moves,
                slot, begin, stop, d, n, pull_high, key_low, key_high,
                N, B, PART, FLUSH, WEIGHTED, REPEL, PULL, whole or STAGE == "update", STAGE == "rescale", DISTANCES,
            )  # fmt: skip
        tl.debug_barrier()
    if STAGE == "distances":
        blocks: tl.constexpr = N // DISTANCE_ROWS
        pair = tl.program_id(1)
        _distances(
            masks, mask_stride, residual, residual_stride, saliency, slot + 4 * N, pair // blocks, pair % blocks,
            begin, stop, d, n, N, B, DISTANCE_ROWS, FLUSH, WEIGHTED,
        )  # fmt: skip
    if STAGE == "plan rescale":
        _plan_rescale(sums, moves, n, total, target, N, SQUARED)
    if whole or STAGE == "finish":
        _finish(sums, densities, norms, slope_norms, saliency_norms, distances, n, total, N, SQUARED)

"""The two passes of the Triton transition over tiles, for any number of particles; see triton_kernels.py."""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton_bfloat16 import round_to_bfloat16
from .triton_columns import clear
from .triton_moves import AFTER, HIGH, KEEP, LOW, RADIAL, SKIPPED, TANGENTIAL
from .triton_rounding import random_bits, round_to_half
from .triton_tiles import add_matrix, centred, descent_of, dot, load_particles, load_vector, scaled


@triton.jit
def reduce_tiles(
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
            m = load_particles(masks, mask_stride, residual, residual_stride, rows, columns, n, end)
            e, g = descent_of(
                m, grads, grad_stride, weights, saliency, mix, masks, mask_stride, residual, residual_stride,
                rows, columns, n, end, N, PART, WEIGHTED, REPEL,
            )  # fmt: skip
            s = scaled(m, sizes, columns, end)
            u = g - lean[:, None] * s
            ee += tl.sum(e * e, axis=1).to(tl.float64)
            es += tl.sum(e * s, axis=1).to(tl.float64)
            eu += tl.sum(e * u, axis=1).to(tl.float64)
            uu += tl.sum(u * u, axis=1).to(tl.float64)
            us += tl.sum(u * s, axis=1).to(tl.float64)
            if sizes is not None:
                c = load_vector(sizes, columns, end)
                cuu += tl.sum(c * u * u, axis=1).to(tl.float64)
                csu += tl.sum(c * s * u, axis=1).to(tl.float64)
                css += tl.sum(c * s * s, axis=1).to(tl.float64)
            else:
                css += tl.sum(s * s, axis=1).to(tl.float64)
            if GRAMS:
                if sizes is not None:
                    c = load_vector(sizes, columns, end)
                    g_mm += dot(m, tl.trans(s))
                    g_mu += dot(s, tl.trans(u))
                    g_uu += dot(u, tl.trans(c * u))
                    g_sm += dot(s, tl.trans(s))
                    g_su += dot(c * s, tl.trans(u))
                    g_ss += dot(c * s, tl.trans(s))
                else:
                    if WEIGHTED:
                        g_mm += dot(m, tl.trans(m))
                    g_mu += dot(m, tl.trans(u))
                    g_uu += dot(u, tl.trans(u))
        if GRAMS:
            grams = sums + 8 * N
            add_matrix(grams, g_mm, N)
            add_matrix(grams + square, g_mu, N)
            add_matrix(grams + 2 * square, g_uu, N)
            if sizes is not None:
                add_matrix(grams + 3 * square, g_sm, N)
                add_matrix(grams + 4 * square, g_su, N)
                add_matrix(grams + 5 * square, g_ss, N)
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
def update_tiles(
    masks, mask_stride, residual, residual_stride, grads, grad_stride, weights, saliency, sizes, mix, moves,
    sums, begin, stop, end, n, pull, key_low, key_high, first_column,
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
            m = load_particles(masks, mask_stride, residual, residual_stride, rows, columns, n, end)
            if MOVES or RESCALES:
                new = m + keep * m
                if MOVES:
                    _, g = descent_of(
                        m, grads, grad_stride, weights, saliency, mix, masks, mask_stride, residual, residual_stride,
                        rows, columns, n, end, N, PART, WEIGHTED, REPEL,
                    )  # fmt: skip
                    s = scaled(m, sizes, columns, end)
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
                    new = round_to_half(new, random_bits(key_low, key_high, rows, columns + first_column))
                    tl.store(to, new.to(tl.float16), mask=inside)
                else:
                    tl.store(to, new, mask=inside)
                m = tl.where((rows < n)[:, None] & (columns < end)[None, :], tl.where(skipped, m, new), 0.0)
            squares = m * m
            mm += tl.sum(squares, axis=1).to(tl.float64)
            if sizes is not None:
                c = load_vector(sizes, columns, end)
                cmm += tl.sum(c * squares, axis=1).to(tl.float64)
                ccmm += tl.sum(c * c * squares, axis=1).to(tl.float64)
            if WEIGHTED:
                amm += tl.sum(load_vector(saliency, columns, end) * squares, axis=1).to(tl.float64)
            if DISTANCES:
                apart = centred(m, rows, n)
                if WEIGHTED:
                    apart *= load_vector(saliency, columns, end)
                gram += dot(apart, tl.trans(apart))
        if DISTANCES:
            add_matrix(sums + 4 * N, gram, N)
    if sizes is None:
        cmm = mm
        ccmm = mm
    tl.store(sums + rows, mm)
    tl.store(sums + N + rows, cmm)
    tl.store(sums + 2 * N + rows, ccmm)
    tl.store(sums + 3 * N + rows, amm)


@triton.jit
def distance_block(
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
            x = load_particles(masks, mask_stride, residual, residual_stride, rows, columns, n, end) - first[None, :]
            y = load_particles(masks, mask_stride, residual, residual_stride, others, columns, n, end) - first[None, :]
            if WEIGHTED:
                a = load_vector(saliency, columns, end)
                x *= a
                y *= a
            part += dot(x, tl.trans(y))
        total += part.to(tl.float64)
    tl.store(at_gram, total)

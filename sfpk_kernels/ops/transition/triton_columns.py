"""The two passes of the Triton transition for few particles: a thread owns whole columns.

All n values of a column lie in registers of one thread, so differences between particles, repulsion, inner products
and means are plain arithmetic without exchange between threads, for exactly n rows, and squared distances are summed
as squares of differences. Sums meet only at the end of a slot, once: a slot has no more columns than fp32 may add, and
what exchanges sums between threads stands in no loop, where Triton before 3.8 would keep its registers through all
rounds. Registers bound n: see triton_backend.tiling. Without sizes; the sums have the layout of triton_passes.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton_bfloat16 import round_to_bfloat16
from .triton_moves import AFTER, HIGH, KEEP, LOW, SKIPPED, TANGENTIAL
from .triton_rounding import random_bits, round_to_half


@triton.jit
def _zeros(count: tl.constexpr, B: tl.constexpr):
    values = ()
    for _ in tl.static_range(count):
        values = values + (tl.zeros([B], tl.float32),)
    return values


@triton.jit
def _rows(pointer, stride, columns, end, ROWS: tl.constexpr):
    """The columns of every row, as fp32 vectors."""
    values = ()
    at = pointer + columns
    for _ in tl.static_range(ROWS):
        values = values + (tl.load(at, mask=columns < end, other=0.0).to(tl.float32),)
        at += stride
    return values


@triton.jit
def _particles(masks, mask_stride, residual, residual_stride, columns, end, ROWS: tl.constexpr):
    m = _rows(masks, mask_stride, columns, end, ROWS)
    if residual is not None:
        rest = _rows(residual, residual_stride, columns, end, ROWS)
        whole = ()
        for i in tl.static_range(ROWS):
            whole = whole + (m[i] + rest[i],)
        m = whole
    return m


@triton.jit
def _descents(grads, grad_stride, weights, columns, end, ROWS: tl.constexpr):
    """e = -dL/dm."""
    e = ()
    g = _rows(grads, grad_stride, columns, end, ROWS)
    factor = -1.0
    if weights is not None:
        factor = -tl.load(weights + columns, mask=columns < end, other=0.0).to(tl.float32)
    for i in tl.static_range(ROWS):
        e = e + (g[i] * factor,)
    return e


@triton.jit
def _repelled(
    e, m, mix, saliency, columns, end, ROWS: tl.constexpr, N: tl.constexpr, WEIGHTED: tl.constexpr, REPEL: tl.constexpr
):  # fmt: skip
    """g = e + w * repulsion; the mix is symmetric, off the diagonal minus the strength of each pair."""
    if REPEL:
        w = 1.0
        if WEIGHTED:
            a = tl.load(saliency + columns, mask=columns < end, other=0.0).to(tl.float32)
            w = a * a
        g = ()
        for i in tl.static_range(ROWS):
            force = tl.zeros_like(m[i])
            for j in tl.static_range(ROWS):
                # From one place for both of a pair: half the registers.
                if i < j:
                    force -= tl.load(mix + i * N + j) * (m[i] - m[j])
                elif i > j:
                    force -= tl.load(mix + j * N + i) * (m[i] - m[j])
            g = g + (e[i] + w * force,)
        return g
    else:
        return e


@triton.jit
def _put(sums, at, values):
    """The fp64 total of a vector, to memory that this program alone writes."""
    tl.store(sums + at, tl.sum(values.to(tl.float64), axis=0))


@triton.jit
def clear(sums, SIZE: tl.constexpr):
    """Zero SIZE fp64 sums."""
    for first in range(0, SIZE, 1024):
        at = first + tl.arange(0, 1024)
        tl.store(sums + at, tl.zeros([1024], tl.float64), mask=at < SIZE)
    tl.debug_barrier()


@triton.jit
def reduce_columns(
    masks, mask_stride, residual, residual_stride, grads, grad_stride, weights, saliency, mix, guess,
    sums, begin, stop, hop, end,
    ROWS: tl.constexpr, N: tl.constexpr, B: tl.constexpr, WEIGHTED: tl.constexpr, REPEL: tl.constexpr,
    GRAMS: tl.constexpr,
):  # fmt: skip
    """As triton_passes.reduce_tiles."""
    square: tl.constexpr = N * N
    mu_at: tl.constexpr = 8 * N + N * N
    uu_at: tl.constexpr = 8 * N + 2 * N * N
    clear(sums, 8 * N + (3 * square if GRAMS else 0))
    ee = _zeros(ROWS, B)
    es = _zeros(ROWS, B)
    eu = _zeros(ROWS, B)
    # Known from the state, but to the sample, which measures a part of the columns.
    ss = _zeros(ROWS if guess is None else 0, B)
    uu = _zeros(ROWS * (ROWS + 1) // 2 if GRAMS else ROWS, B)
    us = _zeros(ROWS * ROWS if GRAMS else ROWS, B)
    for at in range(begin, stop, tl.full([], hop, tl.int64)):
        columns = at + tl.arange(0, B).to(tl.int64)
        m = _particles(masks, mask_stride, residual, residual_stride, columns, end, ROWS)
        e = _descents(grads, grad_stride, weights, columns, end, ROWS)
        g = _repelled(e, m, mix, saliency, columns, end, ROWS, N, WEIGHTED, REPEL)
        u, new_ee, new_es, new_eu, new_ss = (), (), (), (), ()
        for i in tl.static_range(ROWS):
            u_i = g[i]
            if guess is not None:
                u_i = g[i] - tl.load(guess + i) * m[i]
            u = u + (u_i,)
            new_ee = new_ee + (ee[i] + e[i] * e[i],)
            new_es = new_es + (es[i] + e[i] * m[i],)
            new_eu = new_eu + (eu[i] + e[i] * u_i,)
            if guess is None:
                new_ss = new_ss + (ss[i] + m[i] * m[i],)
        ee, es, eu, ss = new_ee, new_es, new_eu, new_ss
        new_uu, new_us = (), ()
        if GRAMS:
            for i in tl.static_range(ROWS):
                for j in tl.static_range(ROWS):
                    new_us = new_us + (us[i * ROWS + j] + m[i] * u[j],)
                for j in tl.static_range(i, ROWS):
                    new_uu = new_uu + (uu[i * ROWS - i * (i - 1) // 2 + j - i] + u[i] * u[j],)
        else:
            for i in tl.static_range(ROWS):
                new_uu = new_uu + (uu[i] + u[i] * u[i],)
                new_us = new_us + (us[i] + u[i] * m[i],)
        uu, us = new_uu, new_us
    for i in tl.static_range(ROWS):
        _put(sums, i, ee[i])
        _put(sums, N + i, es[i])
        _put(sums, 2 * N + i, eu[i])
        if guess is None:
            _put(sums, 7 * N + i, ss[i])
        if GRAMS:
            _put(sums, 3 * N + i, uu[i * ROWS - i * (i - 1) // 2])
            _put(sums, 4 * N + i, us[i * ROWS + i])
            _put(sums, 6 * N + i, us[i * ROWS + i])
            for j in tl.static_range(ROWS):
                _put(sums, mu_at + i * N + j, us[i * ROWS + j])
            for j in tl.static_range(i, ROWS):
                _put(sums, uu_at + i * N + j, uu[i * ROWS - i * (i - 1) // 2 + j - i])
                if i != j:
                    _put(sums, uu_at + j * N + i, uu[i * ROWS - i * (i - 1) // 2 + j - i])
        else:
            _put(sums, 3 * N + i, uu[i])
            _put(sums, 4 * N + i, us[i])
            _put(sums, 6 * N + i, us[i])


@triton.jit
def update_columns(
    masks, mask_stride, residual, residual_stride, grads, grad_stride, weights, saliency, mix, moves,
    sums, begin, stop, end, pull, key_low, key_high, first_column,
    ROWS: tl.constexpr, N: tl.constexpr, B: tl.constexpr, WEIGHTED: tl.constexpr, REPEL: tl.constexpr,
    PULL: tl.constexpr, MOVES: tl.constexpr, RESCALES: tl.constexpr,
):  # fmt: skip
    """As triton_passes.update_tiles."""
    pairs: tl.constexpr = ROWS * (ROWS - 1) // 2
    clear(sums, 4 * N + N * N)
    mm = _zeros(ROWS, B)
    amm = _zeros(ROWS if WEIGHTED else 0, B)
    q = _zeros(pairs, B)
    for at in range(begin, stop, B):
        columns = at + tl.arange(0, B).to(tl.int64)
        m = _particles(masks, mask_stride, residual, residual_stride, columns, end, ROWS)
        if MOVES or RESCALES:
            g = m
            if MOVES:
                e = _descents(grads, grad_stride, weights, columns, end, ROWS)
                g = _repelled(e, m, mix, saliency, columns, end, ROWS, N, WEIGHTED, REPEL)
            moved = ()
            mean = tl.zeros([B], tl.float32)
            for i in tl.static_range(ROWS):
                move = tl.load(moves + KEEP * N + i) * m[i]
                if MOVES:
                    u = (g[i] - tl.load(moves + HIGH * N + i) * m[i]) - tl.load(moves + LOW * N + i) * m[i]
                    move += tl.load(moves + TANGENTIAL * N + i) * u
                # The gradient of a skipped one may be NaN.
                x = tl.where(tl.load(moves + SKIPPED * N + i) > 0, m[i], m[i] + move)
                moved = moved + (x,)
                mean += x
            mean = mean / ROWS
            new = ()
            to = masks + columns
            also = to
            if residual is not None:
                also = residual + columns
            for i in tl.static_range(ROWS):
                x = moved[i]
                stays = tl.load(moves + SKIPPED * N + i) > 0
                if PULL and MOVES:
                    pulled = x + pull * (mean - x)
                    x = tl.where(stays, x, pulled + tl.load(moves + AFTER * N + i) * pulled)
                inside = columns < tl.where(stays, 0, end)
                if residual is not None:
                    rounded = round_to_bfloat16(x)
                    rest = round_to_bfloat16(x - rounded)
                    tl.store(to, rounded.to(tl.bfloat16), mask=inside)
                    tl.store(also, rest.to(tl.bfloat16), mask=inside)
                    x = tl.where(stays, x, rounded + rest)
                    also += residual_stride
                elif masks.dtype.element_ty == tl.float16:
                    row = tl.full([1], i, tl.int32)
                    random = tl.reshape(random_bits(key_low, key_high, row, columns + first_column), [B])
                    x = round_to_half(x, random)
                    tl.store(to, x.to(tl.float16), mask=inside)
                else:
                    tl.store(to, x, mask=inside)
                to += mask_stride
                new = new + (tl.where(columns < end, x, 0.0),)
            m = new
        new_mm, new_amm, new_q = (), (), ()
        a = tl.zeros([B], tl.float32)
        if WEIGHTED:
            a = tl.load(saliency + columns, mask=columns < end, other=0.0).to(tl.float32)
        for i in tl.static_range(ROWS):
            new_mm = new_mm + (mm[i] + m[i] * m[i],)
            if WEIGHTED:
                new_amm = new_amm + (amm[i] + a * m[i] * m[i],)
            for j in tl.static_range(i + 1, ROWS):
                apart = m[i] - m[j]
                if WEIGHTED:
                    apart *= a
                new_q = new_q + (q[i * ROWS - i * (i + 1) // 2 + j - i - 1] + apart * apart,)
        mm, amm, q = new_mm, new_amm, new_q
    for i in tl.static_range(ROWS):
        _put(sums, i, mm[i])
        _put(sums, N + i, mm[i])
        _put(sums, 2 * N + i, mm[i])
        if WEIGHTED:
            _put(sums, 3 * N + i, amm[i])
        # As a Gram matrix with a zero diagonal.
        for j in tl.static_range(i + 1, ROWS):
            half = -0.5 * q[i * ROWS - i * (i + 1) // 2 + j - i - 1]
            _put(sums, 4 * N + i * N + j, half)
            _put(sums, 4 * N + j * N + i, half)

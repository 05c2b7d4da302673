"""Tiles of particles in Triton: (n, B) pieces of the matrices, their products, and g = e + repulsion of one."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tile(pointer, stride, rows, columns, n, end):
    """(rows, columns) of a matrix as fp32, zeros outside."""
    inside = (rows < n)[:, None] & (columns < end)[None, :]
    return tl.load(pointer + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=inside, other=0.0).to(
        tl.float32
    )


@triton.jit
def load_particles(masks, mask_stride, residual, residual_stride, rows, columns, n, end):
    """A tile of the particles, with what rounding took from them."""
    m = load_tile(masks, mask_stride, rows, columns, n, end)
    if residual is not None:
        m += load_tile(residual, residual_stride, rows, columns, n, end)
    return m


@triton.jit
def load_vector(pointer, columns, end):
    """(1, columns) of a vector over coordinates as fp32, zeros outside."""
    return tl.load(pointer + columns, mask=columns < end, other=0.0).to(tl.float32)[None, :]


@triton.jit
def dot(a, b):
    """In plain fp32: tensor cores would round the operands, or take three products and the registers of them."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def centred(m, rows, n):
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
        force = dot(mixes, centred(m, rows, n))
    else:
        mean = tl.sum(m, axis=0) / n
        force = tl.zeros_like(m)
        for first in range(0, N, PART):
            part = first + tl.arange(0, PART)
            others = load_particles(masks, mask_stride, residual, residual_stride, part, columns, n, end)
            mixes = tl.load(mix + rows[:, None] * N + part[None, :])
            force += dot(mixes, others - mean[None, :])
    return force


@triton.jit
def descent_of(
    m, grads, grad_stride, weights, saliency, mix, masks, mask_stride, residual, residual_stride, rows, columns, n, end,
    N: tl.constexpr, PART: tl.constexpr, WEIGHTED: tl.constexpr, REPEL: tl.constexpr,
):  # fmt: skip
    """e = -dL/dm and g = e + w * repulsion of one tile."""
    e = -load_tile(grads, grad_stride, rows, columns, n, end)
    if weights is not None:
        e *= load_vector(weights, columns, end)
    g = e
    if REPEL:
        force = _force(
            m, mix, masks, mask_stride, residual, residual_stride, rows, columns, n, end, N, PART
        )  # fmt: skip
        if WEIGHTED:
            a = load_vector(saliency, columns, end)
            force *= a * a
        g += force
    return e, g


@triton.jit
def add_matrix(pointer, values, N: tl.constexpr):
    """Add an (N, N) fp32 tile to fp64 memory that this program alone writes."""
    at = pointer + tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(at, tl.load(at) + values.to(tl.float64))


@triton.jit
def scaled(m, sizes, columns, end):
    """A tile times the sizes of its columns, where there are sizes."""
    if sizes is not None:
        m = m * load_vector(sizes, columns, end)
    return m

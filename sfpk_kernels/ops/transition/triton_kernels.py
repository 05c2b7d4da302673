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

For few particles the two passes run by columns (triton_columns.py), else by tiles with matrix products
(triton_passes.py). The algebra (triton_algebra.py) is that of csrc/cpu/transition_algebra.cpp:
m' = f (m + alpha s + b u), u = g - slope s, s = c m.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_algebra import double, finish_statistics, plan_moves, plan_rescale, prepare_mix
from .triton_columns import reduce_columns, update_columns
from .triton_passes import distance_block, reduce_tiles, update_tiles

# (In products the tensor stands first: constant * tensor is a constant to the interpreters of Triton 3.7 and 3.8.)
SAMPLED_TILES = tl.constexpr(16)
DISTANCE_ROWS = tl.constexpr(64)  # particles of a block of the stage "distances"


@triton.jit
def combine(slots, sums, count, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """sums (SIZE) = slots (count, SIZE) added in order."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for slot in range(0, count):
        total += tl.load(slots + slot * SIZE + at, mask=at < SIZE, other=0.0)
    tl.store(sums + at, total, mask=at < SIZE)


@triton.jit(do_not_specialize=["n", "chunk", "key_low", "key_high", "only", "first_column"])
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
    reach_high,  # of the tangential part: in units of the radial one, or BY_ANGLE of the particle
    reach_low,
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
    first_column,  # the place of column 0 among the coordinates of all shards
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
    BY_ANGLE: tl.constexpr,
    SKIP: tl.constexpr,
    DISTANCES: tl.constexpr,  # whether the update sums distances, else the stage "distances" does
    ROWS: tl.constexpr,  # n where the passes run by columns (triton_columns.py), else 0
):
    """One stage of a step, or with STAGE "whole" a step in one program; see the head of this file."""
    whole: tl.constexpr = STAGE == "whole"
    sized: tl.constexpr = sizes is not None
    d_wide = double(d_high, d_low)
    total = d_wide
    if sizes is not None:
        total = tl.load(total_of_sizes)
    program = tl.program_id(0).to(tl.int64)
    begin = program * chunk
    stop = tl.minimum(begin + chunk, d)
    slot = slots + program * SIZE
    pull = double(pull_high, pull_low)
    target = double(target_high, target_low)

    if whole or STAGE == "prepare":
        if REPEL:
            prepare_mix(
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
            reduce_tiles(
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
            reduce_tiles(
                masks, mask_stride, residual, residual_stride, grads, grad_stride, weights, saliency, sizes, mix, guess,
                slot, begin, stop, B, d, n, N, B, PART, FLUSH, WEIGHTED, REPEL, GRAMS,
            )  # fmt: skip
        tl.debug_barrier()
    if whole or STAGE == "plan":
        plan_moves(
            old_densities, old_norms, old_slope_norms, old_distances, sums, guess, moves, scratch, cosines, n, only,
            total, double(step_high, step_low),
            double(reach_high, reach_low), double(eps_high, eps_low),
            target, pull,
            N, sized, WEIGHTED, SQUARED, RETRACT, GRAMS, HAS_EPS, BY_ANGLE, SKIP,
        )  # fmt: skip
        tl.debug_barrier()
    if whole or STAGE == "update" or STAGE == "measure" or STAGE == "rescale":
        if ROWS > 0:
            update_columns(
                masks, mask_stride, residual, residual_stride, grads, grad_stride, weights, saliency, mix, moves,
                slot, begin, stop, d, pull_high, key_low, key_high, first_column,
                ROWS, N, B, WEIGHTED, REPEL, PULL, whole or STAGE == "update", STAGE == "rescale",
            )  # fmt: skip
        else:
            update_tiles(
                masks, mask_stride, residual, residual_stride, grads, grad_stride, weights, saliency, sizes, mix, moves,
                slot, begin, stop, d, n, pull_high, key_low, key_high, first_column,
                N, B, PART, FLUSH, WEIGHTED, REPEL, PULL, whole or STAGE == "update", STAGE == "rescale", DISTANCES,
            )  # fmt: skip
        tl.debug_barrier()
    if STAGE == "distances":
        blocks: tl.constexpr = N // DISTANCE_ROWS
        pair = tl.program_id(1)
        distance_block(
            masks, mask_stride, residual, residual_stride, saliency, slot + 4 * N, pair // blocks, pair % blocks,
            begin, stop, d, n, N, B, DISTANCE_ROWS, FLUSH, WEIGHTED,
        )  # fmt: skip
    if STAGE == "plan rescale":
        plan_rescale(sums, moves, n, total, target, N, SQUARED)
    if whole or STAGE == "finish":
        finish_statistics(sums, densities, norms, slope_norms, saliency_norms, distances, n, total, N, SQUARED)

"""Launches the Triton kernels of the fused transition (triton_kernels.py, imported only when it runs)."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ... import _triton
from .spec import Columns, TransitionSpec, TransitionStats

MOST_PARTICLES = 256
WHOLE_COLUMNS = 4096  # up to here one program does the step: launches would cost more than the arithmetic
MOST_BY_COLUMNS = 12
MOST_GRAMS_BY_COLUMNS = 6
_SLOT_COLUMNS = 4096  # at least
_SLOTS = 1024
_SLOT_SUMS = 1 << 24  # fp64 sums in all slots together


class Tiling(NamedTuple):
    """Fixed by n alone and not tuned at run time: another tile would add in another order, and change bits."""

    n: int  # particles, padded to a power of two
    columns: int
    part: int  # particles at a time in products with the (n, n) mix
    warps: int
    flush: int = 4096  # columns summed in fp32 before fp64 takes over, at most
    by_columns: bool = False  # whether threads own whole columns (triton_columns.py)
    distances: bool = True  # whether the update pass has registers for the squared distances, too


def tiling(n: int, sized: bool, residual: bool) -> Tiling:
    """Tiles whose temporaries and sums fit the registers with Triton 3.4 to 3.9; see tests/test_triton_compiles.py."""
    if n <= MOST_BY_COLUMNS and not sized:
        # A thread adds one column in 128: 512 of them before its fp32 sums are handed on.
        return Tiling(16, 128, 16, 4, flush=65536, by_columns=True)
    if n <= 16:
        return Tiling(16, 32, 16, 4)
    if n <= 32:
        return Tiling(32, 32, 16, 4 if residual else 8)
    if n <= 64:
        return Tiling(64, 32, 16, 8)
    return Tiling(128 if n <= 128 else 256, 16, 16, 8, distances=False)


def sums_gram_matrices(n: int, sized: bool, weighted: bool) -> bool:
    """Whether the reduce pass has registers for the Gram matrices that retraction after a pull takes from it.

    Where it has not, a scaling pass behind the update does the same.
    """
    if tiling(n, sized, False).by_columns:
        return n <= MOST_GRAMS_BY_COLUMNS and not weighted
    return n <= 32


def why_not(masks: Tensor) -> str | None:
    """Why the kernels cannot run on these particles."""
    reason = _triton.why_not(masks)
    if reason:
        return reason
    if masks.dtype == torch.float64:
        return "it takes fp32, fp16 and bf16 particles, these are float64"
    if masks.shape[1] > 1 and masks.stride(1) != 1:
        return f"it takes rows without gaps, these have a column stride of {masks.stride(1)}"
    if masks.shape[0] > 1 and abs(masks.stride(0)) < masks.shape[1]:
        return f"it takes rows that do not overlap, these have a row stride of {masks.stride(0)}"
    if masks.shape[0] > MOST_PARTICLES:
        return f"it takes up to {MOST_PARTICLES} particles, these are {masks.shape[0]}"
    return None


def _two_floats(value: float) -> tuple[float, float]:
    """A double as the sum of two fp32 numbers."""
    high = float(np.float32(value))
    return high, value - high


def transition_(
    masks: Tensor,  # (n, d) fp32, fp16 or bf16, moved in place
    grads: Tensor,  # (n, d), or (1, d) with spec.only
    columns: Columns,
    residual: Tensor | None,
    state: TransitionStats | None,
    spec: TransitionSpec,
) -> TransitionStats:
    """As :func:`.reference.transition_`, in two passes over the particles and without a host synchronisation."""
    from . import triton_kernels

    if grads.shape[1] > 1 and grads.stride(1) != 1:
        grads = grads.contiguous()
    grads = grads.expand_as(masks)  # with spec.only its one row for all: what the others make of it is not used
    if residual is not None and residual.shape[1] > 1 and residual.stride(1) != 1:
        raise ValueError("transition_: residual: wanted rows without gaps for backend 'triton', got a column stride")
    weights, saliency, sizes = (t if t is None else t.contiguous() for t in columns)
    n, d = masks.shape
    sized = sizes is not None
    tile = tiling(n, sized, residual is not None)
    grams = spec.retracts_after_pull(n) and sums_gram_matrices(n, sized, spec.weighted)
    rescales = spec.retracts_after_pull(n) and not grams
    square = tile.n**2
    size = max(8 * tile.n + grams * (6 if sized else 3) * square, 4 * tile.n + square)

    tiles = math.ceil(d / tile.columns)
    slots = min(math.ceil(d / _SLOT_COLUMNS), max(128, min(_SLOTS, _SLOT_SUMS // size)))
    if tile.by_columns:  # which add up a whole slot in fp32
        slots = max(slots, math.ceil(d / tile.flush))
    tiles_per_slot = math.ceil(tiles / slots)
    slots = math.ceil(tiles / tiles_per_slot)
    whole = slots == 1 and d <= WHOLE_COLUMNS and not rescales and tile.distances

    def empty(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=masks.device)

    def new_stats() -> TransitionStats:
        return TransitionStats(empty(n), empty(n), empty(n), empty(n), empty(n, n), empty(n))

    new = new_stats()
    old = state if state is not None else new_stats()
    sums = empty(size)
    slot_sums = sums if slots == 1 else empty(slots, size)
    mix, guess, moves = (empty(*s, dtype=torch.float32) for s in ((tile.n, tile.n), (tile.n,), (7, tile.n)))
    scratch = empty(5, tile.n)
    total = None if sizes is None else sizes.sum(dtype=torch.float64)
    numbers = (float(d), spec.step, spec.root, spec.repulsion, spec.eps, spec.target_density or 1.0, spec.consensus)
    key = spec.key
    floats = [part for number in numbers for part in _two_floats(number)]

    def launch(stage: str, grid: tuple[int, ...], before: TransitionStats, after: TransitionStats, key: int) -> None:
        # fmt: off
        _triton.launch(
            triton_kernels.transition, grid, masks.device,
            masks, masks.stride(0), residual, 0 if residual is None else residual.stride(0), grads, grads.stride(0),
            weights, saliency, sizes, total, *before[:5], *after, mix, guess, moves, scratch, slot_sums, sums,
            n, d, tiles_per_slot * tile.columns, max(1, tiles // 16) * tile.columns, *floats,
            key & 0x7FFFFFFF, key >> 31, spec.only,
            STAGE=stage, SIZE=size, N=tile.n, B=tile.columns, PART=tile.part, FLUSH=tile.flush // tile.columns,
            WEIGHTED=spec.weighted, SQUARED=spec.squared, RETRACT=spec.target_density is not None,
            REPEL=spec.repels(n) and stage != "rescale", PULL=spec.pulls(n), GRAMS=grams, HAS_EPS=spec.eps > 0,
            SKIP=spec.skip,
            DISTANCES=tile.distances, ROWS=n if tile.by_columns else 0,
            num_warps=tile.warps, num_stages=1, enable_fp_fusion=True,
        )
        # fmt: on

    def pass_over(stage: str, after: TransitionStats = new) -> None:
        """One pass over the particles and its sums, slot by slot and together."""
        launch(stage, (slots,), old, after, key ^ (stage == "rescale"))
        if stage != "reduce" and not tile.distances:
            launch("distances", (slots, (tile.n // triton_kernels.DISTANCE_ROWS.value) ** 2), old, after, key)
        if slots > 1:
            block = 128
            _triton.launch(
                triton_kernels.combine, (math.ceil(size / block),), masks.device,
                slot_sums, sums, slots, SIZE=size, BLOCK=block, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip

    if state is None:
        pass_over("measure", old)
        launch("finish", (1,), old, old, key)
    if whole:
        launch("whole", (1,), old, new, key)
        return new
    launch("prepare", (1,), old, new, key)
    pass_over("reduce")
    launch("plan", (1,), old, new, key)
    pass_over("update")
    if rescales:
        launch("plan rescale", (1,), old, new, key)
        pass_over("rescale")
    launch("finish", (1,), old, new, key)
    return new

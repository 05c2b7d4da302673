"""Launches the Triton kernels of the fused transition (triton_kernels.py, imported only when it runs)."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ... import _triton
from .spec import Shard, Step, TransitionStats

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


def transition_(step: Step) -> TransitionStats:
    """As :func:`.reference.transition_`, in two passes over the particles and without a host synchronisation."""
    launches = Launches(step)
    if step.state is None:
        launches.measure()
    if launches.whole:
        launches.launch("whole")
    else:
        launches.prepare()
        launches.reduce()
        launches.plan()
        launches.update()
        launches.finish()
    return launches.new


class Launches:
    """The stages of one step, each of which may be launched alone; between them ``sums`` holds those of all columns."""

    def __init__(self, step: Step, shard: Shard | None = None):
        masks, grads, self.spec, columns, residual, state = step
        if residual is not None and residual.shape[1] > 1 and residual.stride(1) != 1:
            raise ValueError(
                "transition_: residual: wanted rows without gaps for backend 'triton', got a column stride"
            )
        if grads.shape[1] > 1 and grads.stride(1) != 1:
            grads = grads.contiguous()
        grads = grads.expand_as(masks)  # with spec.only its one row for all: what the others make of it is not used
        weights, saliency, sizes = (t if t is None else t.contiguous() for t in columns)
        spec, (n, d) = self.spec, masks.shape
        self.masks, self.n = masks, n
        self.tile = tile = tiling(n, sizes is not None, residual is not None)
        pulled = spec.retracts_after_pull(n)
        grams = pulled and sums_gram_matrices(n, sizes is not None, spec.weighted)
        self._rescales = pulled and not grams
        square = tile.n**2
        self.size = max(8 * tile.n + grams * (3 if sizes is None else 6) * square, 4 * tile.n + square)
        tiles = math.ceil(d / tile.columns)
        self.slots, chunk = self._slots(d, tiles)
        self.whole = self.slots == 1 and d <= WHOLE_COLUMNS and not self._rescales and tile.distances

        self.new = self._statistics()
        self.old = self._statistics() if state is None else state
        self.sums = self._empty(self.size)
        self._slot_sums = self.sums if self.slots == 1 else self._empty(self.slots, self.size)
        mix, self.guess, self.moves = (
            self._empty(*shape, dtype=torch.float32) for shape in ((tile.n, tile.n), (tile.n,), (7, tile.n))
        )
        total = None if sizes is None else sizes.sum(dtype=torch.float64)
        whole = float(d if shard is None else shard.d)
        numbers = (whole, spec.step, spec.reach, spec.repulsion, spec.eps, spec.target_density or 1.0, spec.consensus)
        self._key, self._first_column = spec.key, 0 if shard is None else shard.first_column
        self._particles = (
            masks, masks.stride(0), residual, 0 if residual is None else residual.stride(0), grads, grads.stride(0),
            weights, saliency, sizes, total,
        )  # fmt: skip
        self._buffers = mix, self.guess, self.moves, self._empty(5, tile.n), self._slot_sums, self.sums
        self._numbers = (
            n, d, chunk, max(1, tiles // 16) * tile.columns, *(part for x in numbers for part in _two_floats(x)),
        )  # fmt: skip
        self._constants = {
            "SIZE": self.size, "N": tile.n, "B": tile.columns, "PART": tile.part, "FLUSH": tile.flush // tile.columns,
            "WEIGHTED": spec.weighted, "SQUARED": spec.squared, "RETRACT": spec.target_density is not None,
            "PULL": spec.pulls(n), "GRAMS": grams, "HAS_EPS": spec.eps > 0, "BY_ANGLE": spec.angle is not None,
            "SKIP": spec.skip, "DISTANCES": tile.distances, "ROWS": n if tile.by_columns else 0,
            "num_warps": tile.warps, "num_stages": 1, "enable_fp_fusion": True,
        }  # fmt: skip

    def measure(self) -> None:
        """The statistics of the particles before the step."""
        self.reduce("measure", self.old)
        self.launch("finish", self.old)

    def prepare(self) -> None:
        """The repulsion as a mix of particles, and how far g leans on the slope, from a sample."""
        self.launch("prepare")

    def plan(self) -> None:
        """From those sums, what the step does with each particle; the cosines."""
        self.launch("plan")

    def update(self) -> None:
        """Move the particles; the sums of the moved ones."""
        self.reduce("update")
        if self._rescales:
            self.launch("plan rescale")
            self.reduce("rescale")

    def finish(self) -> None:
        """From those sums, the statistics behind the step."""
        self.launch("finish")

    def launch(self, stage: str, after: TransitionStats | None = None, grid: tuple[int, ...] = (1,)) -> None:
        """One stage by its name in triton_kernels.py, over one slot or by one program."""
        from . import triton_kernels

        key = self._key ^ (stage == "rescale")
        _triton.launch(
            triton_kernels.transition, grid, self.masks.device,
            *self._particles, *self.old[:5], *(self.new if after is None else after), *self._buffers, *self._numbers,
            key & 0x7FFFFFFF, key >> 31, self.spec.only, self._first_column,
            STAGE=stage, REPEL=self.spec.repels(self.n) and stage != "rescale", **self._constants,
        )  # fmt: skip

    def reduce(self, stage: str = "reduce", after: TransitionStats | None = None) -> None:
        """One pass over the particles ("measure", "reduce", "update" or "rescale") and its sums, slots together."""
        from . import triton_kernels

        self.launch(stage, after, (self.slots,))
        if stage != "reduce" and not self.tile.distances:
            blocks = (self.tile.n // triton_kernels.DISTANCE_ROWS.value) ** 2
            self.launch("distances", after, (self.slots, blocks))
        if self.slots > 1:
            block = 128
            _triton.launch(
                triton_kernels.combine, (math.ceil(self.size / block),), self.masks.device,
                self._slot_sums, self.sums, self.slots, SIZE=self.size, BLOCK=block, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip

    def rows(self, first: int, last: int) -> Tensor:  # (last - first, n)
        """Sums per particle, a row for each kind."""
        size = self.tile.n
        return self.sums[first * size : last * size].view(last - first, size)[:, : self.n]

    def matrices(self, first: int, count: int) -> Tensor:  # (count, n, n)
        """Sums per pair of particles, behind ``first`` rows."""
        size = self.tile.n
        begin = first * size
        return self.sums[begin : begin + count * size**2].view(count, size, size)[:, : self.n, : self.n]

    def _slots(self, d: int, tiles: int) -> tuple[int, int]:
        """How many slots of how many columns the passes work on."""
        slots = min(math.ceil(d / _SLOT_COLUMNS), max(128, min(_SLOTS, _SLOT_SUMS // self.size)))
        if self.tile.by_columns:  # which add up a whole slot in fp32
            slots = max(slots, math.ceil(d / self.tile.flush))
        tiles_per_slot = math.ceil(tiles / slots)
        return math.ceil(tiles / tiles_per_slot), tiles_per_slot * self.tile.columns

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.masks.device)

    def _statistics(self) -> TransitionStats:
        shapes = ((self.n,),) * 4 + ((self.n, self.n), (self.n,))
        return TransitionStats(*(self._empty(*shape) for shape in shapes))

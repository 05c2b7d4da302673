"""How particles of two bytes are stored: fp16 rounded stochastically, bf16 with the rounding error kept beside it.

Rounding to nearest loses every move below half a unit in the last place, and with it the search. Stochastic rounding
keeps moves in the mean: up with the probability of the part cut off. The random bits are a function of (key, row,
column) alone, so every backend draws the same ones; the key mixes seed and step (:func:`rounding_key`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..codes import HIGH_STRIDE, MIX_FIRST, MIX_SECOND, ROW_STRIDE

_WORD = 0xFFFFFFFF
_SMALLEST_NORMAL = 2.0**-14  # of fp16; below it the unit in the last place is 2⁻²⁴
_LARGEST = 65504.0

TWO_BYTES = (torch.float16, torch.bfloat16)


def rounding_key(
    seed: int,  # any integer
    step: int,  # any integer
) -> int:  # in [0, 2⁶²)
    """One key per seed and step (splitmix64, Steele et al. 2014); neighbouring ones have nothing in common."""
    word = 0xFFFFFFFFFFFFFFFF
    state = seed & word
    for addend in (0x9E3779B97F4A7C15, (step & word) * 0xD1B54A32D192ED03):
        state = (state + addend) & word
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & word
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & word
        state ^= state >> 31
    return state >> 2


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit words whose every input bit flips half of the output bits (lowbias32, Wellons)."""
    x = x ^ (x >> 16)
    x = (x * MIX_FIRST) & _WORD
    x = x ^ (x >> 15)
    x = (x * MIX_SECOND) & _WORD
    return x ^ (x >> 16)


def random_bits(
    rows: int, columns: int, key: int, device: torch.device, first_column: int = 0
) -> Tensor:  # (rows, columns) int64
    """Uniform 32-bit words, a function of key, row and column; columns count from ``first_column``."""
    row = torch.arange(rows, dtype=torch.int64, device=device)[:, None]
    column = torch.arange(columns, dtype=torch.int64, device=device) + first_column
    first = _mix(((key & 0x7FFFFFFF) + row * ROW_STRIDE) & _WORD)
    second = _mix(first ^ (key >> 31))
    low, high = column & _WORD, column >> 32
    return _mix((_mix(low ^ first) + second + high * HIGH_STRIDE) & _WORD)


def stochastic_half(values: Tensor, key: int, first_column: int = 0) -> Tensor:
    """fp32 ``values`` (n, d) as fp16, one of the two neighbours, the value itself in the mean.

    Beyond ±65504 the result is ±65504, not infinity.
    """
    bits = random_bits(values.shape[0], values.shape[1], key, values.device, first_column)
    size = values.abs().clamp(max=_LARGEST)
    # 13 bits of an fp32 mantissa are cut off: add as many random ones first.
    normal = ((size.view(torch.int32) + (bits >> 19).to(torch.int32)) & ~0x1FFF).view(torch.float32)
    tiny = torch.floor(size * 2.0**24 + (bits >> 8) * 2.0**-24) * 2.0**-24
    rounded = torch.where(size < _SMALLEST_NORMAL, tiny, normal.clamp(max=_LARGEST))
    return rounded.copysign(values).half()


def read(masks: Tensor, residual: Tensor | None) -> Tensor:
    """The particles in the dtype to compute in: fp32 for two-byte ones, plus what rounding left in ``residual``."""
    if masks.dtype not in TWO_BYTES:
        return masks
    return masks.float() if residual is None else masks.float() + residual.float()


def write_(
    values: Tensor,  # (n, d), in the dtype that read() computes in
    masks: Tensor,
    residual: Tensor | None,
    stays: Tensor,  # (n,) bool: rows that are left as they are
    key: int,
    first_column: int = 0,  # the place of column 0 among the coordinates of all shards
) -> None:
    """Store ``values`` in ``masks``: fp16 stochastically, bf16 with its error in ``residual``."""
    stays = stays[:, None]
    if masks.dtype == torch.float16:
        values = stochastic_half(values, key, first_column)
    rounded = values.to(masks.dtype)
    if residual is not None:
        residual.copy_(torch.where(stays, residual, (values - rounded.float()).to(residual.dtype)))
    masks.copy_(torch.where(stays, masks, rounded))

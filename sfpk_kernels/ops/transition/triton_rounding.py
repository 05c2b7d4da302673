"""Rounding of two-byte particles in Triton, the same bits as rounding.py."""

from __future__ import annotations

import triton
import triton.language as tl

from .. import codes

MIX_FIRST = tl.constexpr(codes.MIX_FIRST)
MIX_SECOND = tl.constexpr(codes.MIX_SECOND)
ROW_STRIDE = tl.constexpr(codes.ROW_STRIDE)
HIGH_STRIDE = tl.constexpr(codes.HIGH_STRIDE)


@triton.jit
def _mix_bits(x):
    x = x ^ (x >> 16)
    x = x * MIX_FIRST
    x = x ^ (x >> 15)
    x = x * MIX_SECOND
    return x ^ (x >> 16)


@triton.jit
def random_bits(key_low, key_high, rows, columns):
    """Uniform 32-bit words (rows, columns), as rounding.random_bits."""
    first = _mix_bits(tl.full([], key_low, tl.uint32) + rows.to(tl.uint32) * ROW_STRIDE)
    second = _mix_bits(first ^ tl.full([], key_high, tl.uint32))
    low = columns.to(tl.uint32)
    high = (columns >> 32).to(tl.uint32)
    return _mix_bits(_mix_bits(low[None, :] ^ first[:, None]) + second[:, None] + (high * HIGH_STRIDE)[None, :])


@triton.jit
def round_to_half(values, random):
    """As rounding.stochastic_half; fp32, exactly representable in fp16."""
    bits = values.to(tl.uint32, bitcast=True)
    sign = bits & 0x80000000
    bits = tl.minimum(bits & 0x7FFFFFFF, 0x477FE000)
    size = bits.to(tl.float32, bitcast=True)
    normal = tl.minimum((bits + (random >> 19)) & 0xFFFFE000, 0x477FE000)
    share = size * 16777216.0 + (random >> 8).to(tl.float32) * 5.9604644775390625e-08
    tiny = tl.floor(share) * 5.9604644775390625e-08
    chosen = tl.where(size < 6.103515625e-05, tiny.to(tl.uint32, bitcast=True), normal)
    return (sign | chosen).to(tl.float32, bitcast=True)

"""Rounding to bf16 in Triton: its interpreter cuts bits off where GPUs round."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def round_to_bfloat16(values):
    """To nearest, ties to even; fp32, exactly representable in bf16."""
    bits = values.to(tl.uint32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)

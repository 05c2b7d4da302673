"""Where the coefficients of a move lie, in units of N."""

from __future__ import annotations

import triton.language as tl

HIGH = tl.constexpr(0)
LOW = tl.constexpr(1)
KEEP = tl.constexpr(2)
RADIAL = tl.constexpr(3)
TANGENTIAL = tl.constexpr(4)
AFTER = tl.constexpr(5)
SKIPPED = tl.constexpr(6)

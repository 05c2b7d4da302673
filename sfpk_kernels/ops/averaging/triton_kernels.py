"""The Triton kernel of averages of gradients: gradients, averages and weights read once, the averages written."""

import triton
import triton.language as tl

from .._triton_bfloat16 import round_to_bfloat16


@triton.jit
def average(
    grads, averages, weights, sums, d, grad_stride, average_stride, share,
    AVERAGES: tl.constexpr, WRITES: tl.constexpr, FAR: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """TILES blocks of one row; ``sums`` (rows, programs, 4) fp64: Σab, Σa², Σb², Σa⁴ of a = w g and b = w v.

    With WRITES g becomes the average, ``share`` away from g, or with FAR from v, the nearer of the two.
    """
    part = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)
    both = tl.zeros((BLOCK,), tl.float64)
    squares = tl.zeros((BLOCK,), tl.float64)
    others = tl.zeros((BLOCK,), tl.float64)
    fourths = tl.zeros((BLOCK,), tl.float64)
    for tile in range(TILES):
        at = (part * TILES + tile) * BLOCK + tl.arange(0, BLOCK)
        inside = at < d
        place = grads + row * grad_stride + at
        g = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(weights + at, mask=inside, other=0.0).to(tl.float64)
        a = g.to(tl.float64) * w
        square = a * a
        squares += square
        fourths += square * square
        if AVERAGES:
            v = tl.load(averages + row * average_stride + at, mask=inside, other=0.0).to(tl.float32)
            b = v.to(tl.float64) * w
            both += a * b
            others += b * b
            if WRITES:
                if FAR:
                    mean = share * (v - g) + v
                else:
                    mean = share * (v - g) + g
                if grads.dtype.element_ty == tl.bfloat16:
                    mean = tl.where(mean == mean, round_to_bfloat16(mean), mean)
                tl.store(place, mean.to(grads.dtype.element_ty), mask=inside)
    out = sums + (row * tl.num_programs(0) + part) * 4
    tl.store(out, tl.sum(both, 0))
    tl.store(out + 1, tl.sum(squares, 0))
    tl.store(out + 2, tl.sum(others, 0))
    tl.store(out + 3, tl.sum(fourths, 0))

"""Triton kernels of masked weights: one read of mask and weights, one write; and of the mask's gradient."""

import triton
import triton.language as tl

from .._triton_bfloat16 import round_to_bfloat16
from ..codes import MaskKind, Score

BOOL = tl.constexpr(MaskKind.BOOL.value)
PACKED = tl.constexpr(MaskKind.PACKED.value)
FACTORS = tl.constexpr(MaskKind.FACTORS.value)
VALUE = tl.constexpr(Score.VALUE.value)
ABS_SALIENCY = tl.constexpr(Score.ABS_SALIENCY.value)
VALUE_SALIENCY = tl.constexpr(Score.VALUE_SALIENCY.value)


@triton.jit
def apply(
    weights, mask, saliency, threshold, tie_end, out, n, mask_stride, cut_stride, out_stride, begin, end, first, groups,
    inner, low, high,
    KIND: tl.constexpr, SCORE: tl.constexpr, SINGLE: tl.constexpr, PART: tl.constexpr, BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Weights [begin, end) of a piece under every row of the mask; with PART those of coordinates [low, high) alone.

    KIND and SCORE as in codes.py; bools are bytes, packed bits come in units of BITS. Coordinate of weight w:
    first + w where SINGLE, else first + (w // inner) % groups.
    """
    at = begin + tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < end
    weight = tl.load(weights + at, mask=inside, other=0.0)
    index = first + (at if SINGLE else (at // inner) % groups)
    if PART:
        inside = inside & (index >= low) & (index < high)
    if SCORE == ABS_SALIENCY or SCORE == VALUE_SALIENCY:  # noqa: SIM109 - Triton does not know "in"
        sizes = tl.load(saliency + index, mask=inside, other=0.0)
    for i in range(n):
        row = tl.full([], 0, tl.int64) + i
        if KIND == FACTORS:
            factor = tl.load(mask + row * mask_stride + index, mask=inside, other=0.0)
            result = weight.to(tl.float32) * factor.to(tl.float32)
        else:
            if KIND == BOOL:
                keep = tl.load(mask + row * mask_stride + index, mask=inside, other=0) != 0
            elif KIND == PACKED:
                word = tl.load(mask + row * mask_stride + index // BITS, mask=inside, other=0).to(tl.int32)
                keep = ((word >> (index % BITS).to(tl.int32)) & 1) != 0
            else:
                score = tl.load(mask + row * mask_stride + index, mask=inside, other=0.0).to(tl.float32)
                if SCORE != VALUE and SCORE != VALUE_SALIENCY:
                    score = tl.abs(score)
                if SCORE == ABS_SALIENCY or SCORE == VALUE_SALIENCY:  # noqa: SIM109
                    score = score * sizes
                limit = tl.load(threshold + row * cut_stride)
                keep = (score > limit) | ((score == limit) & (index < tl.load(tie_end + row * cut_stride)))
            result = tl.where(keep, weight.to(tl.float32), 0.0)
        if out.dtype.element_ty == tl.bfloat16:
            result = tl.where(result == result, round_to_bfloat16(result), result)
        tl.store(out + row * out_stride + at, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def products(weights, grads, out, n, grad_stride, out_stride, count, ADDS: tl.constexpr, BLOCK: tl.constexpr):
    """θ · gradient, one weight a coordinate; with ADDS added to ``out``, which is fp64 then."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    weight = tl.load(weights + at, mask=inside, other=0.0).to(tl.float32)
    for i in range(n):
        row = tl.full([], 0, tl.int64) + i
        grad = tl.load(grads + row * grad_stride + at, mask=inside, other=0.0).to(tl.float32)
        place = out + row * out_stride + at
        if ADDS:
            # The product is rounded before it is added.
            total = tl.load(place, mask=inside, other=0.0) + (weight * grad).to(tl.float64)
            tl.store(place, total, mask=inside)
        else:
            tl.store(place, weight * grad, mask=inside)


@triton.jit
def group_sums(
    weights, grads, out, grad_stride, out_stride, outer, groups, inner,
    ADDS: tl.constexpr, G: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Sums of the products over the weights of G groups at a time: [:, g, :] of (outer, groups, inner).

    With ADDS they are added to ``out``, which is fp64 then.
    """
    group = tl.program_id(0).to(tl.int64) * G + tl.arange(0, G)
    row = tl.program_id(1).to(tl.int64)
    total = tl.zeros((G,), tl.float64)
    for o in range(outer):
        for begin in range(tl.full([], 0, tl.int64), inner, WIDE):
            i = begin + tl.arange(0, WIDE)
            at = ((tl.full([], 0, tl.int64) + o) * groups + group[:, None]) * inner + i[None, :]
            inside = (group[:, None] < groups) & (i[None, :] < inner)
            weight = tl.load(weights + at, mask=inside, other=0.0).to(tl.float32)
            grad = tl.load(grads + row * grad_stride + at, mask=inside, other=0.0).to(tl.float32)
            total += tl.sum((weight * grad).to(tl.float64), 1)
    place = out + row * out_stride + group
    if ADDS:
        tl.store(place, tl.load(place, mask=group < groups, other=0.0) + total, mask=group < groups)
    else:
        tl.store(place, total.to(tl.float32), mask=group < groups)

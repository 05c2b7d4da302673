"""Triton kernels of the exact selection: a radix select of 8 bits a pass, ties by flat index.

A score becomes a key that is ordered as an unsigned integer; 0 is no candidate. Every count is an integer, so the order
of the atomic additions changes nothing. ``state`` has one row per selection, all int64: see the columns below.
"""

import triton
import triton.language as tl

from ..codes import Score

VALUE = tl.constexpr(Score.VALUE.value)
ABS = tl.constexpr(Score.ABS.value)
VALUE_SALIENCY = tl.constexpr(Score.VALUE_SALIENCY.value)
MEAN_ABS_SALIENCY = tl.constexpr(Score.MEAN_ABS_SALIENCY.value)

# Columns of the state.
PREFIX = tl.constexpr(0)  # leading bits of the key at the cut, as far as known
WANTED = tl.constexpr(1)  # how many are kept among the keys with this prefix
EQUAL = tl.constexpr(2)  # how many keys have this prefix
NAN = tl.constexpr(3)  # whether a score was NaN
CHUNK = tl.constexpr(4)  # where the last kept tie lies, -1 where all ties are kept
COLUMNS = tl.constexpr(8)
DIGITS = tl.constexpr(256)


@triton.jit
def keys_of(values, saliency, excluded, at, inside, n, stride, scale, SCORE: tl.constexpr, EXCLUDES: tl.constexpr):
    """Keys, and which scores are NaN, of the entries ``at``; SCORE as in codes.Score."""
    score = tl.load(values + at, mask=inside, other=0.0).to(tl.float32)
    if SCORE != VALUE and SCORE != VALUE_SALIENCY:
        score = tl.abs(score)
    if SCORE == MEAN_ABS_SALIENCY:
        for i in range(1, n):
            row = tl.full([], 0, tl.int64) + i
            score += tl.abs(tl.load(values + row * stride + at, mask=inside, other=0.0).to(tl.float32))
    if SCORE != VALUE and SCORE != ABS:
        score *= tl.load(saliency + at, mask=inside, other=0.0)
    if SCORE == MEAN_ABS_SALIENCY:
        score *= scale
    nan = (score != score) & inside
    bits = score.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = tl.where(key == -1, 0, key)  # -0
    ordered = (key ^ -0x80000000).to(tl.uint32, bitcast=True)
    candidate = inside & (score == score)
    if EXCLUDES:
        candidate = candidate & (tl.load(excluded + at, mask=inside, other=1) == 0)
    return tl.where(candidate, ordered, 0), nan


@triton.jit
def count_digits(
    values, saliency, excluded, state, bins, n, stride, row_excluded, d, scale,
    SHIFT: tl.constexpr, SCORE: tl.constexpr, EXCLUDES: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Adds this program's histogram of the 8 bits at SHIFT, of the keys whose higher bits are the prefix."""
    row = tl.program_id(1).to(tl.int64)
    begin = tl.program_id(0).to(tl.int64) * (BLOCK * TILES)
    prefix = tl.load(state + row * COLUMNS + PREFIX).to(tl.uint32)
    counts = tl.zeros((DIGITS,), tl.int32)
    seen = tl.zeros((BLOCK,), tl.int32)
    for tile in range(TILES):
        at = begin + tile * BLOCK + tl.arange(0, BLOCK)
        inside = at < d
        key, nan = keys_of(
            values + row * stride,
            saliency,
            excluded + row * row_excluded,
            at,
            inside,
            n,
            stride,
            scale,
            SCORE,
            EXCLUDES,
        )
        seen |= nan.to(tl.int32)
        counted = inside & (key > 0)
        if SHIFT < 24:
            counted = counted & ((key >> (SHIFT + 8)) == prefix)
        counts += tl.histogram(((key >> SHIFT) & 255).to(tl.int32), DIGITS, mask=counted)
    tl.atomic_add(bins + row * DIGITS + tl.arange(0, DIGITS), counts.to(tl.int64), sem="relaxed")
    if SHIFT == 24:
        if tl.max(seen, 0) > 0:
            tl.store(state + row * COLUMNS + NAN, tl.full([], 1, tl.int64))


@triton.jit
def choose_digit(state, bins):
    """Appends to the prefix the digit in which the last kept key lies; clears the bins."""
    row = tl.program_id(0).to(tl.int64)
    digit = tl.arange(0, DIGITS)
    counts = tl.load(bins + row * DIGITS + digit)
    tl.store(bins + row * DIGITS + digit, tl.zeros((DIGITS,), tl.int64))
    total = tl.sum(counts, 0)
    above = total - tl.cumsum(counts, 0)
    wanted = tl.load(state + row * COLUMNS + WANTED)
    wanted = tl.minimum(tl.maximum(wanted, 1), tl.maximum(total, 1))
    here = (above < wanted) & (above + counts >= wanted)
    prefix = tl.load(state + row * COLUMNS + PREFIX)
    tl.store(state + row * COLUMNS + PREFIX, prefix * 256 + tl.sum(tl.where(here, digit, 0), 0))
    tl.store(state + row * COLUMNS + WANTED, wanted - tl.sum(tl.where(here, above, 0), 0))
    tl.store(state + row * COLUMNS + EQUAL, tl.sum(tl.where(here, counts, 0), 0))


@triton.jit
def count_ties(
    values, saliency, excluded, state, ties, n, stride, row_excluded, d, scale, first_chunk, chunks,
    SCORE: tl.constexpr, EXCLUDES: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """How many keys of each chunk are the one at the cut, where not all of them are kept."""
    row = tl.program_id(1).to(tl.int64)
    chunk = tl.program_id(0).to(tl.int64)
    wanted = tl.load(state + row * COLUMNS + WANTED)
    if wanted < tl.load(state + row * COLUMNS + EQUAL):
        cut = tl.load(state + row * COLUMNS + PREFIX).to(tl.uint32)
        found = tl.zeros((BLOCK,), tl.int32)
        for tile in range(TILES):
            at = chunk * (BLOCK * TILES) + tile * BLOCK + tl.arange(0, BLOCK)
            inside = at < d
            key, nan = keys_of(
                values + row * stride, saliency, excluded + row * row_excluded, at, inside, n, stride, scale, SCORE,
                EXCLUDES,
            )  # fmt: skip
            found += (inside & (key == cut)).to(tl.int32)
        tl.store(ties + row * chunks + first_chunk + chunk, tl.sum(found, 0).to(tl.int64))


@triton.jit
def find_chunk(state, ties, k, candidates, threshold, tie_end, chunks, d, BLOCK: tl.constexpr):
    """The cut's threshold; its tie end where no tie is left out, else the chunk in which it lies."""
    row = tl.program_id(0).to(tl.int64)
    wanted = tl.load(state + row * COLUMNS + WANTED)
    equal = tl.load(state + row * COLUMNS + EQUAL)
    key = (tl.load(state + row * COLUMNS + PREFIX).to(tl.uint32)).to(tl.int32, bitcast=True) ^ -0x80000000
    bits = key ^ ((key >> 31) & 0x7FFFFFFF)
    score = bits.to(tl.float32, bitcast=True)
    kept = tl.load(k + row)
    most = tl.load(candidates + row)
    nan = tl.load(state + row * COLUMNS + NAN)
    score = tl.where(kept >= most, -float("inf"), score)
    score = tl.where(kept <= 0, float("inf"), score)
    score = tl.where(nan != 0, float("nan"), score)
    end = tl.where(kept <= 0, 0, tl.where(nan != 0, 0, d))
    tl.store(threshold + row, score)
    tl.store(tie_end + row, end.to(tl.int64))
    chosen = tl.full([], -1, tl.int64)
    if wanted < equal:
        before = tl.full([], 0, tl.int64)
        for begin in range(0, chunks, BLOCK):
            at = begin + tl.arange(0, BLOCK)
            counts = tl.load(ties + row * chunks + at, mask=at < chunks, other=0)
            sums = tl.cumsum(counts, 0) + before
            here = (sums >= wanted) & (sums - counts < wanted)
            found = tl.sum(here.to(tl.int32), 0) > 0
            chosen = tl.where(found, tl.sum(tl.where(here, at, 0), 0).to(tl.int64), chosen)
            left = wanted - tl.sum(tl.where(here, sums - counts, 0), 0)
            tl.store(state + row * COLUMNS + WANTED, tl.where(found, left, tl.load(state + row * COLUMNS + WANTED)))
            before += tl.sum(counts, 0)
    chosen = tl.where(kept >= most, -1, tl.where(kept <= 0, -1, tl.where(nan != 0, -1, chosen)))
    tl.store(state + row * COLUMNS + CHUNK, chosen)


@triton.jit
def find_tie(
    values, saliency, excluded, state, tie_end, n, stride, row_excluded, d, scale, first, first_chunk, last_chunk,
    SCORE: tl.constexpr, EXCLUDES: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """One past the last kept tie, where it lies in this tensor."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.load(state + row * COLUMNS + CHUNK)
    if tl.where(chunk >= first_chunk, chunk, last_chunk) < last_chunk:
        wanted = tl.load(state + row * COLUMNS + WANTED)
        cut = tl.load(state + row * COLUMNS + PREFIX).to(tl.uint32)
        begin = (chunk - first_chunk) * (BLOCK * TILES)
        before = tl.full([], 0, tl.int64)
        for tile in range(TILES):
            at = begin + tile * BLOCK + tl.arange(0, BLOCK)
            inside = at < d
            key, nan = keys_of(
                values + row * stride, saliency, excluded + row * row_excluded, at, inside, n, stride, scale, SCORE,
                EXCLUDES,
            )  # fmt: skip
            tied = (inside & (key == cut)).to(tl.int64)
            sums = tl.cumsum(tied, 0) + before
            here = (tied > 0) & (sums == wanted)
            if tl.sum(here.to(tl.int32), 0) > 0:
                tl.store(tie_end + row, first + tl.sum(tl.where(here, at, 0), 0).to(tl.int64) + 1)
            before += tl.sum(tied, 0)


@triton.jit
def write_mask(
    values, saliency, excluded, always, state, threshold, tie_end, out, n, stride, row_excluded, row_always, row_out, d,
    scale, first,
    SCORE: tl.constexpr, EXCLUDES: tl.constexpr, ALWAYS: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Bools (UNIT 1), or bits in units of 8 or 32."""
    row = tl.program_id(1).to(tl.int64)
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    at = begin + tl.arange(0, BLOCK)
    inside = at < d
    key, nan = keys_of(
        values + row * stride, saliency, excluded + row * row_excluded, at, inside, n, stride, scale, SCORE, EXCLUDES
    )
    cut = tl.load(state + row * COLUMNS + PREFIX).to(tl.uint32)
    end = tl.load(tie_end + row)
    limit = tl.load(threshold + row)
    cut = tl.where(limit == -float("inf"), 0, cut)  # all candidates
    keep = (key > cut) | ((key == cut) & (first + at < end))
    keep = keep & (key > 0) & inside & (end > 0)
    if ALWAYS:
        keep = keep | (tl.load(always + row * row_always + at, mask=inside, other=0) != 0)
    if UNIT == 1:
        tl.store(out + row * row_out + at, keep, mask=inside)
    else:
        bits = tl.reshape(keep.to(tl.int32), (BLOCK // UNIT, UNIT)) << tl.arange(0, UNIT)[None, :]
        unit = begin // UNIT + tl.arange(0, BLOCK // UNIT)
        words = tl.sum(bits, 1).to(out.dtype.element_ty)
        tl.store(out + row * row_out + unit, words, mask=unit * UNIT < d)

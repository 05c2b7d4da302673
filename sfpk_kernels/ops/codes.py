"""The codes and numbers that Python shares with its kernels: those in C++ and CUDA have them from csrc/codes.h.

tests/test_codes.py compares the two places, and reads the sources for a third.
"""

from __future__ import annotations

from enum import IntEnum


class Score(IntEnum):
    """What entries are ranked by."""

    VALUE = 0
    ABS = 1
    ABS_SALIENCY = 2
    VALUE_SALIENCY = 3
    MEAN_ABS_SALIENCY = 4


class MaskKind(IntEnum):
    """What a mask is made of."""

    BOOL = 0
    PACKED = 1  # bits
    FACTORS = 2
    CUT = 3  # particle values and the cut they are compared with


class Packing(IntEnum):
    """How a selected mask is written, if at all."""

    NONE = -1
    BOOL = 0
    UINT8 = 1
    INT32 = 2


SCORES = tuple(score.name.lower() for score in Score)  # as callers spell them
ENTRY_SCORES = tuple(word for word in SCORES if word != Score.MEAN_ABS_SALIENCY.name.lower())  # one entry, one score

# Below this share of ‖g‖ the tangential part is rounding noise of fp32 products, not a direction.
TANGENT_TOLERANCE = 1e-6

# Of the random bits of stochastic rounding: the multipliers of a bijection of 32-bit words (lowbias32, Wellons), and
# how far a row and the high word of a column move them.
MIX_FIRST, MIX_SECOND = 0x7FEB352D, 0x846CA68B
ROW_STRIDE, HIGH_STRIDE = 0x9E3779B9, 0x85EBCA6B

MOST_ROWS = 65_535  # along y of a CUDA grid

# What the selection in CUDA is given to work in.
SELECTION_CHUNK = 1 << 14  # entries whose ties are counted together
SELECTION_STATE_COLUMNS = 8  # int64 per ranking
SELECTION_COUNTERS = (1 << 11) + 1  # of a histogram: bins, and keys above them


def score_code(word: str) -> int:
    """The number of a score, which callers spell in lower case."""
    return Score[word.upper()].value


def packing_code(word: str) -> int:
    """The number of a packing: ``"bool"``, ``"uint8"``, ``"int32"``."""
    return Packing[word.upper()].value

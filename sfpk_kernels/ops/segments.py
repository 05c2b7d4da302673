"""Segments of the coordinates, as the ops' ``segments=`` has them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from . import _checks as check


def segment_borders(
    op: str, segments: Any, tensors: list[Tensor] | None, d: int, *, offsets: bool = False
) -> list[int]:
    """Offsets 0 … d, empty for one segment.

    ``tensors`` are those whose borders "tensors" stands for, if for any; others are taken then only with ``offsets``.

    Raises:
        TypeError: no sequence of integers.
        ValueError: no rising offsets from 0 to d, or a word that means nothing here.
    """
    if segments is None:
        return []
    if tensors is not None and not (offsets and not isinstance(segments, str)):
        if not isinstance(segments, str) or segments != "tensors":
            wanted = "None, offsets or 'tensors'" if offsets else "None or 'tensors'"
            raise ValueError(f"{op}: segments: wanted {wanted} for a list of tensors, got {segments!r:.80}")
        borders = [0]
        for tensor in tensors:
            borders.append(borders[-1] + tensor.numel())
        return borders
    integers = isinstance(segments, Sequence) and all(check.is_integer(b) for b in segments)
    if isinstance(segments, str) or not integers:
        raise TypeError(f"{op}: segments: wanted a sequence of integers, got {segments!r:.80}")
    borders = [check.plain(b) for b in segments]
    rising = all(a <= b for a, b in itertools.pairwise(borders))
    if len(borders) < 2 or borders[0] != 0 or borders[-1] != d or not rising:
        raise ValueError(f"{op}: segments: wanted rising offsets from 0 to {d}, got {segments!r:.80}")
    return borders

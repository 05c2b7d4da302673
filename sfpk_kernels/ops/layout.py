"""Layouts: which weights each coordinate governs, in parts of one tensor or of several.

A layout is a list of :class:`Blocks` that cover the weights of a list of tensors one after the other, each within one
tensor. Two blocks may have coordinates in common: a channel governs slices of the convolution that reads it and entries
of the batch-norm before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

from . import _checks as check

_NUMBERS = 4  # of a piece, in a layout as the ops take it: outer, groups, inner, first


class Blocks(NamedTuple):
    """``groups`` coordinates over a piece of weights seen as (outer, groups, inner).

    Coordinate ``first + g`` governs all of [:, g, :]. A tensor's output channels are ``Blocks(1, shape[0], rest)``, the
    input channels of a convolution ``Blocks(shape[0], shape[1], kernel size)``, its single weights
    ``Blocks(1, numel, 1)``.
    """

    outer: int
    groups: int
    inner: int
    first: int | None = None  # its first coordinate; None: the one after the last of the blocks before it

    @property
    def numel(self) -> int:
        """Weights of the piece."""
        return self.outer * self.groups * self.inner


@dataclass(frozen=True)
class Piece:
    """Weights that one :class:`Blocks` describes, one after the other in memory."""

    tensor: int  # index in the caller's list
    begin: int  # its first weight in that tensor, flattened
    outer: int
    groups: int
    inner: int
    first: int  # its first coordinate

    @property
    def numel(self) -> int:
        """How many weights it has."""
        return self.outer * self.groups * self.inner

    @property
    def single(self) -> bool:
        """Whether each of its coordinates governs one of its weights."""
        return self.outer * self.inner == 1

    @property
    def end(self) -> int:
        """One past its last coordinate."""
        return self.first + self.groups

    @property
    def coordinates(self) -> slice:
        """Its part of the coordinates."""
        return slice(self.first, self.end)

    def of(self, tensor: Tensor) -> Tensor:
        """Its part (…, numel) of a tensor (…, all weights of the caller's tensor)."""
        if self.begin == 0 and self.numel == tensor.shape[-1]:
            return tensor
        return tensor[..., self.begin : self.begin + self.numel]


def normalize(op: str, layout: Any, sizes: Sequence[int], coordinates: Any = None) -> tuple[list[int], int]:
    """The layout as the ops take it, and how many coordinates there are.

    Four numbers a piece; empty for one coordinate per weight.

    Raises:
        TypeError: no list of Blocks, or a number of coordinates that is no integer.
        ValueError: one that does not fit weights of these sizes, or beyond the coordinates there are.
    """
    if coordinates is not None and not check.is_integer(coordinates):
        raise TypeError(f"{op}: coordinates: wanted an integer or None, got {coordinates!r:.80}")
    if layout is None:
        reach = sum(sizes)
        if coordinates is not None and coordinates < reach:
            raise ValueError(f"{op}: coordinates: wanted ≥ {reach}, one per weight, got {coordinates}")
        return [], reach if coordinates is None else check.plain(coordinates)
    entries = [layout] if isinstance(layout, Blocks) else layout
    if not isinstance(entries, Sequence) or not all(isinstance(b, Sequence) and len(b) in (3, 4) for b in entries):
        raise TypeError(f"{op}: layout: wanted a list of Blocks(outer, groups, inner, first), got {layout!r:.80}")
    flat: list[int] = []
    following = 0
    for i, (outer, groups, inner, *first) in enumerate(entries):
        piece = [check.plain(v) for v in (outer, groups, inner)]
        if any(v < 1 for v in piece):
            raise ValueError(f"{op}: layout: wanted numbers ≥ 1, got {layout!r:.80}")
        begin = check.plain(first[0]) if first and first[0] is not None else following
        following = begin + piece[1]
        if begin < 0 or (coordinates is not None and following > coordinates):
            wanted = "coordinates ≥ 0" if coordinates is None else f"coordinates from 0 to {coordinates - 1}"
            raise ValueError(f"{op}: layout[{i}]: wanted {wanted}, got {begin} to {following - 1}")
        flat += [*piece, begin]
    if pieces(flat, sizes) is None:
        wanted = (
            f"blocks of {' + '.join(map(str, sizes))} weights" if len(sizes) < 5 else f"blocks of {sum(sizes)} weights"
        )
        got = " + ".join(str(math.prod(b[:3])) for b in entries[:5]) + (" + …" if len(entries) > 5 else "")
        raise ValueError(f"{op}: layout: wanted {wanted}, each within one tensor, got {got}")
    return flat, count(flat, sizes) if coordinates is None else check.plain(coordinates)


def pieces(flat: Sequence[int], sizes: Sequence[int]) -> list[Piece] | None:
    """The pieces of a layout, or None where it does not fit tensors of these sizes."""
    done: list[Piece] = []
    if not flat:
        first = 0
        for tensor, size in enumerate(sizes):
            done.append(Piece(tensor, 0, 1, size, 1, first))
            first += size
        return done
    tensor, begin = 0, 0
    for i in range(0, len(flat), _NUMBERS):
        while tensor < len(sizes) and begin == sizes[tensor]:
            tensor, begin = tensor + 1, 0
        piece = Piece(tensor, begin, *flat[i : i + _NUMBERS])
        if tensor == len(sizes) or begin + piece.numel > sizes[tensor]:
            return None
        done.append(piece)
        begin += piece.numel
    return done if sum(sizes[tensor:]) == begin else None


def numbers(parts: Sequence[Piece]) -> list[int]:
    """What the kernels are told of pieces: outer, groups, inner and first of each."""
    return [number for p in parts for number in (p.outer, p.groups, p.inner, p.first)]


def count(flat: Sequence[int], sizes: Sequence[int]) -> int:
    """How many coordinates a layout reaches."""
    if not flat:
        return sum(sizes)
    reach = 0
    for i in range(0, len(flat), _NUMBERS):
        groups, first = flat[i + 1], flat[i + 3]
        end = first + groups
        # Where coordinates follow one another, symbolic sizes need not be compared.
        reach = end if first == reach else max(reach, end)
    return reach


class Sharing(NamedTuple):
    """Which pieces have coordinates to themselves, and where the sums of the others are collected."""

    alone: list[Piece]
    shared: list[Piece]  # in the order of the layout; their coordinates are places among the sums
    places: list[tuple[slice, slice]]  # coordinates, and the places of their sums
    size: int  # how many sums there are
    covers: bool  # whether every coordinate governs a weight


def sharing(parts: Sequence[Piece], coordinates: int) -> Sharing:
    """Pieces told apart by whether a coordinate of theirs has weights in another piece."""
    clusters: list[list[Piece]] = []  # of pieces that overlap, one with the next
    end, covers = 0, True
    for piece in sorted(parts, key=lambda p: p.first):
        if piece.groups == 0:
            continue
        if clusters and piece.first < end:
            clusters[-1].append(piece)
        else:
            clusters.append([piece])
            covers = covers and piece.first == end
        end = max(end, piece.end)
    moved: dict[Piece, Piece] = {}
    places: list[tuple[slice, slice]] = []
    size = 0
    for cluster in clusters:
        if len(cluster) == 1:
            continue
        begin, after = cluster[0].first, max(piece.end for piece in cluster)
        moved.update({piece: replace(piece, first=size + piece.first - begin) for piece in cluster})
        if places and places[-1][0].stop == begin:  # the sums follow one another as well
            coordinates_before, sums_before = places.pop()
            places.append((slice(coordinates_before.start, after), slice(sums_before.start, size + after - begin)))
        else:
            places.append((slice(begin, after), slice(size, size + after - begin)))
        size += after - begin
    alone = [piece for piece in parts if piece not in moved]
    return Sharing(alone, [moved[p] for p in parts if p in moved], places, size, covers and end == coordinates)

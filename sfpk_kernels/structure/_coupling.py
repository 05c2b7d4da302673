"""Positions that must stay or go together: connected components over the links of a traced graph."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

from torch import nn

from ._tracing import Link, Side, Traced

Position = tuple[Side, int]


def grouped_whole(conv: nn.modules.conv._ConvNd) -> bool:
    """Whether a grouped convolution loses whole groups, a depthwise one its channels; else positions in every group."""
    return conv.groups >= max(conv.in_channels, conv.out_channels) // conv.groups


def couple(traced: Traced, deadline: float) -> list[list[Position]]:
    """The components that hold an output of a convolution, Linear or Embedding.

    Every position reached is asked for all it belongs to: a path through chunk and add loses none.

    Raises:
        TimeoutError: it was later than the deadline.
    """
    links: dict[Side, list[Link]] = defaultdict(list)
    for link in traced.links():
        links[link.source].append(link)
    union = _Union()
    reached: dict[Side, set[int]] = defaultdict(set)
    waiting: list[tuple[Side, list[int]]] = []

    def reach(side: Side, positions: list[int]) -> None:
        new = [p for p in dict.fromkeys(positions) if p not in reached[side]]
        if new:
            reached[side].update(new)
            waiting.append((side, new))

    for number, node in enumerate(traced.nodes):
        channels = out_positions(node.module)
        if channels:
            reach((number, "out"), list(range(channels)))
    while waiting:
        if time.monotonic() > deadline:
            raise TimeoutError
        side, positions = waiting.pop()
        pairs = [((side, p), other) for p in positions for other in _within(traced, side, p)]
        for link in links[side]:
            pairs += [((side, p), (link.target, q)) for p, q in link.positions(positions)]
        found: dict[Side, list[int]] = defaultdict(list)
        for one, other in pairs:
            union.join(one, other)
            found[other[0]].append(other[1])
        for target, others in found.items():
            reach(target, others)
    return union.components([(side, p) for side, positions in reached.items() for p in sorted(positions)])


def out_positions(module: Any) -> int:
    """How many outputs a producer has, 0 for what is none."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.out_channels
    if isinstance(module, nn.Linear):
        return module.out_features
    return module.embedding_dim if isinstance(module, nn.Embedding) else 0


def _within(traced: Traced, side: Side, position: int) -> list[Position]:
    """What belongs to a position inside its own node."""
    number, which = side
    node = traced.nodes[number]
    module = node.module
    if isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1:
        sizes = {"in": module.in_channels // module.groups, "out": module.out_channels // module.groups}
        if grouped_whole(module):
            group = position // sizes[which]
            return [((number, s), group * size + k) for s, size in sizes.items() for k in range(size)]
        return [(side, group * sizes[which] + position % sizes[which]) for group in range(module.groups)]
    pieces = traced.pieces(node)
    if pieces is None:
        return []
    size, count = pieces  # equal parts must stay equal
    return [(side, k * size + position % size) for k in range(count)]


class _Union:
    """Sets that are joined, each known by a root."""

    def __init__(self) -> None:
        self._parent: dict[Position, Position] = {}

    def find(self, one: Position) -> Position:
        root = one
        while (above := self._parent.get(root, root)) != root:
            root = above
        while (above := self._parent.get(one, one)) != root:
            self._parent[one] = root
            one = above
        return root

    def join(self, one: Position, other: Position) -> None:
        a, b = self.find(one), self.find(other)
        if a != b:
            self._parent[b] = a

    def components(self, positions: list[Position]) -> list[list[Position]]:
        found: dict[Position, list[Position]] = defaultdict(list)
        for one in positions:
            found[self.find(one)].append(one)
        return list(found.values())

"""Positions that must stay or go together: connected components over the links of a traced graph."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from typing import Any

from torch import nn

from ._tracing import Link, Side, Traced

Position = tuple[Side, int]


def grouped_whole(conv: nn.modules.conv._ConvNd) -> bool:
    """Whether a grouped convolution loses whole groups, a depthwise one its channels; else positions in every group."""
    return conv.groups >= max(conv.in_channels, conv.out_channels) // conv.groups


def couple(traced: Traced, deadline: float) -> list[list[Position]]:
    """The components that hold an output of a convolution, Linear or Embedding.

    Every position reached is asked for all it belongs to: a path through chunk and add loses none. One that its module
    does not have, where a reshape was taken for another, leads no further; from then on nor does one past the widest
    layer: round a cycle there would be ever more.

    Raises:
        TimeoutError: it was later than the deadline.
    """
    links: dict[Side, list[Link]] = defaultdict(list)
    for link in traced.links():
        links[link.source].append(link)
    union = _Union()
    reached: dict[Side, set[int]] = defaultdict(set)
    waiting: deque[tuple[Side, list[int]]] = deque()
    sizes = [_sizes(node) for node in traced.nodes]
    widest = max((size for one in sizes for size in one.values()), default=0)
    misread: set[Side] = set()

    def reach(side: Side, positions: list[int]) -> None:
        new = [p for p in dict.fromkeys(positions) if p not in reached[side]]
        reached[side].update(new)
        size = sizes[side[0]].get(side[1])
        inside = [p for p in new if size is None or p < size]
        if len(inside) < len(new):
            misread.add(side)
        if inside:
            waiting.append((side, inside))

    for number, node in enumerate(traced.nodes):
        channels = out_positions(node.module)
        if channels:
            reach((number, "out"), list(range(channels)))
    while waiting:
        if time.monotonic() > deadline:
            raise TimeoutError
        side, positions = waiting.popleft()
        if misread:
            positions = [p for p in positions if p < widest]
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


def _sizes(node: Any) -> dict[str, int]:
    """How many positions the sides of a node have, where its module says so."""
    module = node.module
    if isinstance(module, nn.modules.conv._ConvNd):
        return {"in": module.in_channels, "out": module.out_channels}
    if isinstance(module, nn.Linear):
        return {"in": module.in_features, "out": module.out_features}
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return {"out": module.num_features}
    if isinstance(module, nn.LayerNorm):
        return {"out": module.normalized_shape[-1]}
    if isinstance(module, nn.Parameter) and module.dim():
        return {"out": module.shape[int(node.pruning_dim) % module.dim()]}
    return {"out": out_positions(module)} if out_positions(module) else {}


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

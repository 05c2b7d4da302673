"""Weights that lie in the same memory without being the same parameter."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor


def place(tensor: Tensor) -> Hashable:
    """Equal for parameters that are, or hold, the very same numbers: one object, or one memory in the same order."""
    if not _lies_somewhere(tensor):
        return id(tensor)
    return str(tensor.device), tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def overlaps(named: Sequence[tuple[str, Tensor]]) -> Iterator[tuple[str, str]]:
    """Pairs of names whose tensors share some of their memory, and not all of it alike."""
    spans = []
    for name, tensor in named:
        if _lies_somewhere(tensor):
            begin, entries = tensor.data_ptr(), _span(tensor)
            spans.append((str(tensor.device), begin, begin + entries * tensor.element_size(), name, tensor))
    spans.sort(key=lambda span: span[:3])
    reaching: list[tuple[str, int, int, str, Tensor]] = []  # those that may reach into the next
    for span in spans:
        reaching = [other for other in reaching if other[0] == span[0] and other[2] > span[1]]
        for other in reaching:
            if place(other[4]) != place(span[4]) and _share(other[4], span[4]):
                yield other[3], span[3]
        reaching.append(span)


def _lies_somewhere(tensor: Tensor) -> bool:
    if tensor.layout != torch.strided or tensor.numel() == 0 or tensor.device.type == "meta":
        return False
    try:
        return tensor.data_ptr() != 0
    except (RuntimeError, NotImplementedError):  # wrappers without memory of their own
        return False


def _span(tensor: Tensor) -> int:
    """Entries from its first to its last."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _share(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of overlapping spans have an entry in common: columns of one matrix need not."""
    if _span(a) == a.numel() and _span(b) == b.numel():
        return True
    if a.element_size() != b.element_size():
        return True
    first = min(a.data_ptr(), b.data_ptr())
    if (a.data_ptr() - first) % a.element_size() or (b.data_ptr() - first) % a.element_size():
        return True
    starts = [(tensor.data_ptr() - first) // tensor.element_size() for tensor in (a, b)]
    count = max(start + _span(tensor) for start, tensor in zip(starts, (a, b), strict=True))
    taken = torch.zeros(count, dtype=torch.bool, device="cpu")
    taken.as_strided(a.shape, a.stride(), starts[0]).fill_(True)
    return bool(taken.as_strided(b.shape, b.stride(), starts[1]).any())

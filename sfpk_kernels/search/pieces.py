"""Large tensors piece by piece, for sums that are taken in fp64."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

_PART = {"cpu": 1 << 18}  # elements in one piece: what stays in the cache
_PART_ELSEWHERE = 1 << 22


def pieces(
    *tensors: Tensor,  # (rows, d) or (d,), the first with rows
) -> Iterator[tuple[Tensor, ...]]:
    """The same columns of each."""
    rows, device = tensors[0].shape[0], tensors[0].device.type
    size = max(1, _PART.get(device, _PART_ELSEWHERE) // rows)
    return zip(*(tensor.split(size, dim=-1) for tensor in tensors), strict=True)

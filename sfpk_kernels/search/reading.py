"""One host read for many small tensors: each read alone would wait for the device again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def read_together(**tensors: Tensor) -> dict[str, Any]:
    """Their values as (nested) lists of floats, numbers for 0-d ones, copied to the host in one go.

    Args:
        tensors: on one device; any shapes and real dtypes that fp64 holds exactly.
    """
    flat = torch.cat([tensor.reshape(-1).double() for tensor in tensors.values()])
    values, read, begin = flat.tolist(), {}, 0
    for name, tensor in tensors.items():
        read[name] = _shaped(values[begin : begin + tensor.numel()], tuple(tensor.shape))
        begin += tensor.numel()
    return read


def _shaped(values: list[float], shape: tuple[int, ...]) -> Any:
    if not shape:
        return values[0]
    if len(shape) == 1:
        return values
    size = len(values) // shape[0] if shape[0] else 0
    return [_shaped(values[i * size : (i + 1) * size], shape[1:]) for i in range(shape[0])]

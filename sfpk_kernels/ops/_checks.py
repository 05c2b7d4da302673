"""Argument checks shared by the ops: every message names the op, the argument, what was wanted, what came."""

from __future__ import annotations

import contextlib
import numbers
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def is_tensor(op: str, name: str, value: Any, dtypes: tuple[torch.dtype, ...] = FLOATS) -> Tensor:
    """``value`` is a tensor of one of ``dtypes``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name}: wanted a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{op}: {name}: wanted {wanted}, got {str(value.dtype).removeprefix('torch.')}")
    return value


def has_shape(op: str, name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    """``value`` has exactly this shape."""
    if tuple(value.shape) != shape:
        raise ValueError(f"{op}: {name}: wanted shape {shape}, got {tuple(value.shape)}")


def same_device(op: str, name: str, value: Tensor, device: torch.device) -> None:
    """``value`` lies on ``device``."""
    if value.device != device:
        raise ValueError(f"{op}: {name}: wanted device {device}, got {value.device}")


def is_integer(value: Any) -> bool:
    """Whether it is an integer, a symbolic one included; bools are none."""
    return isinstance(value, numbers.Integral | torch.SymInt) and not isinstance(value, bool)


def plain(value: Any) -> Any:
    """NumPy's integers as Python's; a symbolic one stays symbolic."""
    return value if isinstance(value, int | torch.SymInt) else int(value)


def is_real(op: str, name: str, value: Any, wanted: str, low: float, high: float, *, open_low: bool = True) -> float:
    """``value`` is a finite number within the range that ``wanted`` puts in words."""
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
        raise TypeError(f"{op}: {name}: wanted a number {wanted}, got {value!r}")
    number = float(value)
    above = number > low if open_low else number >= low
    if not (above and number <= high and number < float("inf")):
        raise ValueError(f"{op}: {name}: wanted a number {wanted}, got {value!r}")
    return number


_lowest: Any = WeakTensorKeyDictionary()  # tensor → (version, lowest value): constants of a run are looked at once


def at_least(op: str, name: str, value: Tensor, low: float, *, strictly: bool = False) -> None:
    """Every entry of ``value`` is ≥ ``low`` (> with ``strictly``)."""
    if value.numel() == 0:
        return
    if value.is_inference():  # it has no version to notice changes by
        lowest = float(value.min())
    else:
        version, lowest = _lowest.get(value, (None, 0.0))
        if version is None or version != value._version:
            version, lowest = value._version, float(value.min())
            _lowest[value] = version, lowest
    if not (lowest > low if strictly else lowest >= low):
        raise ValueError(f"{op}: {name}: wanted all {'>' if strictly else '≥'} {low:g}, got {lowest}")


def was_written(*tensors: Tensor) -> None:
    """Tells autograd that a kernel it does not see has changed these: gradients from stale values raise then."""
    torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])


@contextlib.contextmanager
def writing(*tensors: Tensor | None) -> Iterator[None]:
    """Lets kernels write into tensors made under inference mode."""
    if any(t is not None and t.is_inference() for t in tensors) and not torch.is_inference_mode_enabled():
        with torch.inference_mode():
            yield
    else:
        yield


def owns_memory(op: str, name: str, value: Tensor) -> None:
    """No two entries of ``value`` lie in the same place."""
    if value.is_contiguous():
        return
    extent = 1
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size > 1 and stride < extent:
            raise ValueError(
                f"{op}: {name}: wanted memory of its own for every entry, as it is written, got shape "
                f"{tuple(value.shape)} with strides {value.stride()}"
            )
        extent += (size - 1) * stride


def is_one_of(op: str, name: str, value: Any, choices: tuple[str, ...]) -> None:
    """``value`` is one of the names in ``choices``."""
    if value not in choices:
        wanted = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{op}: {name}: wanted one of {wanted}, got {value!r}")


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether the address ranges of two tensors overlap (ranges: rows interleaved in one buffer count)."""
    if a.numel() == 0 or b.numel() == 0 or a.device != b.device:
        return False

    def span(t: Tensor) -> tuple[int, int]:
        last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()

    (a_begin, a_end), (b_begin, b_end) = span(a), span(b)
    return a_begin < b_end and b_begin < a_end

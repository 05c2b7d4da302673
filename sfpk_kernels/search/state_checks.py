"""Entries of a saved state, looked at before anything is changed: each error names its entry."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

_PART = 1 << 22  # elements looked at together


def entries(name: str, value: Any, wanted: Iterable[str]) -> Mapping[str, Any]:
    """A dict of exactly these entries."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name}: wanted a dict, got {got(value)}")
    keys = set(wanted)
    missing, more = sorted(keys - value.keys()), sorted(str(key) for key in value.keys() - keys)
    if missing or more:
        what = f"without {missing}" if missing else f"with {more[:5]}, which none has"
        raise ValueError(f"{name}: wanted a dict of {', '.join(sorted(keys))}, got one {what}")
    return value


def sequence(name: str, value: Any, count: int | None = None) -> list[Any]:
    """A list (or tuple), of so many entries."""
    if not isinstance(value, list | tuple):
        raise TypeError(f"{name}: wanted a list, got {got(value)}")
    if count is not None and len(value) != count:
        raise ValueError(f"{name}: wanted {count} entries, got {len(value)}")
    return list(value)


def integer(name: str, value: Any, low: int = 0, high: int | None = None) -> int:
    """A whole number within a range."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: wanted an integer, got {got(value)}")
    number = int(value)
    if number < low or (high is not None and number > high):
        wanted = f"≥ {low}" if high is None else f"{low} … {high}" if low < high else f"{low}"
        raise ValueError(f"{name}: wanted {wanted}, got {number}")
    return number


def real(name: str, value: Any, low: float = -math.inf, high: float = math.inf, *, finite: bool = True) -> float:
    """A number within a range; one that need not be ``finite`` may also be NaN."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: wanted a number, got {got(value)}")
    number = float(value)
    if finite and not math.isfinite(number):
        raise ValueError(f"{name}: wanted a finite number, got {number}")
    if number < low or number > high:
        raise ValueError(f"{name}: wanted a number in [{low:g}, {high:g}], got {number:g}")
    return number


def reals(
    name: str, value: Any, count: int, low: float = -math.inf, high: float = math.inf, *, finite: bool = True
) -> list[float]:
    """So many numbers."""
    items = sequence(name, value, count)
    return [real(f"{name}[{i}]", item, low, high, finite=finite) for i, item in enumerate(items)]


def text(name: str, value: Any, wanted: Iterable[str] | None = None) -> str:
    """A string, one of those wanted."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: wanted a string, got {got(value)}")
    if wanted is not None and value not in (choices := tuple(wanted)):
        raise ValueError(f"{name}: wanted one of {', '.join(choices)}, got {got(value)}")
    return value


def texts(name: str, value: Any) -> list[str]:
    """Strings."""
    return [text(f"{name}[{i}]", item) for i, item in enumerate(sequence(name, value))]


def numbers_by_name(name: str, value: Any, *, whole: bool) -> dict[str, Any]:
    """A dict of numbers ≥ 0."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name}: wanted a dict, got {got(value)}")
    check = integer if whole else real
    return {text(f"{name}: key", key): check(f"{name}[{key!r}]", item, 0) for key, item in value.items()}


def tensor(
    name: str,
    value: Any,
    shape: tuple[int, ...],
    *dtypes: torch.dtype,
    finite: bool = True,
) -> Tensor:
    """A tensor with values of its own, detached; where it lies does not matter."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: wanted a tensor, got {got(value)}")
    if value.dtype not in dtypes:
        words = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: wanted {words}, got {str(value.dtype).removeprefix('torch.')}")
    if value.is_nested or value.layout != torch.strided:
        raise ValueError(f"{name}: wanted a dense tensor, got a nested one or one of layout {value.layout}")
    if tuple(value.shape) != shape:
        raise ValueError(f"{name}: wanted shape {shape}, got {tuple(value.shape)}")
    if value.is_meta:
        raise ValueError(f"{name}: wanted values, got a tensor on the meta device")
    value = value.detach()
    if finite and not is_finite(value):
        raise ValueError(f"{name}: wanted finite numbers, got NaN or infinity")
    return value


def is_finite(value: Tensor) -> bool:
    """Whether there is neither NaN nor infinity; in parts, because the answer of each is as long as the part."""
    if not (value.is_floating_point() or value.is_complex()) or value.numel() == 0:
        return True
    parts = value.split(max(1, _PART * value.shape[0] // value.numel())) if value.dim() else (value,)
    return all(bool(part.isfinite().all()) for part in parts)


def same(a: Any, b: Any) -> bool:
    """Whether two plain values (dicts and lists of strings, numbers, None) are equal; False for what is not plain."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if a is None or isinstance(a, str | bool) or b is None or isinstance(b, str | bool):
        return type(a) is type(b) and bool(a == b)
    return isinstance(a, numbers.Real) and isinstance(b, numbers.Real) and bool(a == b)


def got(value: Any) -> str:
    """What came, in a few words."""
    if value is None or isinstance(value, str | bool | numbers.Number):
        words = repr(value)
        return words if len(words) <= 60 else f"{words[:57]}…"
    return type(value).__name__

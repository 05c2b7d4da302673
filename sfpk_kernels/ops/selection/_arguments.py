"""What a selection may be asked for, checked by shape and type; what depends on values is checked in _selection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks as check
from ..codes import SCORES
from ..segments import segment_borders


class Cut(NamedTuple):
    """Which coordinates a selection keeps.

    Those with score > threshold, and of those with score == threshold the ones with flat index < tie_end. Under
    ``protected`` and ``removed`` a cut ranks the other coordinates only.
    """

    threshold: Tensor  # (rows, segments) fp32, fp64 for fp64 values: score of the last one kept
    tie_end: Tensor  # (rows, segments) int64: one past the last tie kept; d where all ties are kept


class Call(NamedTuple):
    """The arguments of a selection, in the order of the torch ops: as a caller gives them, or normalized."""

    values: Any  # normalized: (n, d), or a list of tensors
    k: Any  # (rows,) int64
    score: str
    saliency: Any  # like values: a tensor, a list, or None
    sizes: Any
    segments: Any  # (S + 1), or empty for one segment
    min_keep: Any  # (S), or empty
    max_keep: Any  # (S), or empty
    pattern: Any  # N, M, or empty
    protected: Any
    removed: Any
    guess: Any  # (rows, S), or None

    def without_pattern(self) -> tuple[Any, ...]:
        """The arguments of the ops that give a cut."""
        return (*self[:_PATTERN], *self[_PATTERN + 1 :])


_PATTERN = Call._fields.index("pattern")


def normalize(op: str, given: Call) -> Call:
    """The op's arguments from the caller's.

    Raises:
        TypeError, ValueError: what is wrong with them, as far as it does not depend on values.
    """
    values, score, saliency = given.values, given.score, given.saliency
    check.is_one_of(op, "score", score, SCORES)
    tensors = _tensors(op, values, score)
    is_list = not isinstance(values, Tensor)
    rows = 1 if is_list or values.dim() == 1 or score == "mean_abs_saliency" else values.shape[0]
    d = sum(t.numel() for t in tensors) if is_list else values.shape[-1]
    device = tensors[0].device
    if (saliency is None) == score.endswith("saliency"):
        wanted = "values to multiply with" if saliency is None else "None"
        raise ValueError(f"{op}: saliency: wanted {wanted} with score={score!r}, got {_kind(saliency)}")

    shapes = [tuple(t.shape) for t in tensors] if is_list else [(d,)]
    whole = [tuple(values.shape)] if not is_list and score != "mean_abs_saliency" else []

    def companion(name: str, dtypes: tuple[torch.dtype, ...], rowwise: bool = False) -> Any:
        value = getattr(given, name)
        if value is None:
            return None
        if is_list != (not isinstance(value, Tensor)) or (is_list and not isinstance(value, Sequence)):
            raise TypeError(
                f"{op}: {name}: wanted {'a list of tensors' if is_list else 'a tensor'}, got {_kind(value)}"
            )
        parts = list(value) if is_list else [value]
        if len(parts) != len(tensors):
            raise ValueError(f"{op}: {name}: wanted {len(tensors)} tensors, got {len(parts)}")
        for i, part in enumerate(parts):
            label = f"{name}[{i}]" if is_list else name
            check.is_tensor(op, label, part, dtypes)
            if not (rowwise and tuple(part.shape) in whole):
                check.has_shape(op, label, part, shapes[i])
            check.same_device(op, label, part, device)
        return parts if is_list else value

    others = (given.segments, given.min_keep, given.max_keep, given.pattern)
    if given.sizes is not None and any(x is not None for x in others):
        raise ValueError(f"{op}: sizes: wanted no segments, min_keep, max_keep or pattern beside them, got some")
    borders = segment_borders(op, given.segments, tensors if is_list else None, d)
    count = max(len(borders) - 1, 1)
    floors, caps = (_limits(op, name, getattr(given, name), borders) for name in ("min_keep", "max_keep"))
    for s, (low, high) in enumerate(zip(floors, caps, strict=False)):
        if low > high:
            raise ValueError(f"{op}: min_keep: wanted at most max_keep = {high} in segment {s}, got {low}")
    return Call(
        values=tensors if is_list else values.unsqueeze(0) if values.dim() == 1 else values,
        k=_counts(op, given.k, rows),
        score=score,
        saliency=companion("saliency", check.FLOATS),
        sizes=companion("sizes", (*check.FLOATS, torch.int64)),
        segments=borders,
        min_keep=floors,
        max_keep=caps,
        pattern=_pattern(op, given.pattern, tensors),
        protected=companion("protected", (torch.bool,), rowwise=True),
        removed=companion("removed", (torch.bool,), rowwise=True),
        guess=_guess(op, given.guess, rows, count),
    )


def _kind(value: Any) -> str:
    return "None" if value is None else type(value).__name__


def _tensors(op: str, values: Any, score: str) -> list[Tensor]:
    if isinstance(values, Tensor):
        check.is_tensor(op, "values", values)
        dims = (2,) if score == "mean_abs_saliency" else (1, 2)
        if values.dim() not in dims or (dims == (2,) and values.shape[0] == 0):
            wanted = "(n ≥ 1, d)" if dims == (2,) else "(d,) or (n, d)"
            raise ValueError(f"{op}: values: wanted shape {wanted}, got {tuple(values.shape)}")
        return [values]
    if not isinstance(values, Sequence) or not values:
        raise TypeError(f"{op}: values: wanted a tensor or a non-empty list of tensors, got {values!r:.80}")
    if score == "mean_abs_saliency":
        raise ValueError(f"{op}: score: wanted a score of single entries for a list of tensors, got {score!r}")
    for i, tensor in enumerate(values):
        check.is_tensor(op, f"values[{i}]", tensor)
        check.same_device(op, f"values[{i}]", tensor, values[0].device)
        if tensor.dtype != values[0].dtype:
            raise TypeError(f"{op}: values[{i}]: wanted {values[0].dtype} as in values[0], got {tensor.dtype}")
    return list(values)


def _counts(op: str, k: Any, rows: int) -> Tensor:
    if isinstance(k, Tensor):
        if k.dtype != torch.int64:
            raise TypeError(f"{op}: k: wanted an int64 tensor, got {k.dtype}")
        check.has_shape(op, "k", k, (rows,))
        return k
    if check.is_integer(k):
        return torch.full((rows,), k, dtype=torch.int64, device="cpu")
    if not isinstance(k, Sequence) or not all(check.is_integer(v) for v in k):
        raise TypeError(f"{op}: k: wanted an integer or one per row, got {k!r}")
    if len(k) != rows:
        raise ValueError(f"{op}: k: wanted {rows} values, one per row, got {len(k)}")
    return torch.tensor([check.plain(v) for v in k], dtype=torch.int64, device="cpu")


def _limits(op: str, name: str, value: Any, borders: list[int]) -> list[int]:
    if value is None:
        return []
    if not borders:
        raise ValueError(f"{op}: {name}: wanted None without segments, got {value!r:.80}")
    parts = len(borders) - 1
    limits = [value] * parts if check.is_integer(value) else list(value) if isinstance(value, Sequence) else None
    if limits is None or not all(check.is_integer(v) for v in limits):
        raise TypeError(f"{op}: {name}: wanted an integer or one per segment, got {value!r:.80}")
    if len(limits) != parts:
        raise ValueError(f"{op}: {name}: wanted {parts} values, one per segment, got {len(limits)}")
    for s, limit in enumerate(limits):
        if limit < 0:
            raise ValueError(f"{op}: {name}: wanted ≥ 0, got {limit} in segment {s}")
    return [check.plain(v) for v in limits]


def _pattern(op: str, pattern: Any, tensors: list[Tensor]) -> list[int]:
    if pattern is None:
        return []
    if not isinstance(pattern, Sequence) or len(pattern) != 2 or not all(check.is_integer(v) for v in pattern):
        raise TypeError(f"{op}: pattern: wanted two integers (N, M), got {pattern!r:.80}")
    keep, group = (check.plain(v) for v in pattern)
    if not 0 <= keep <= group or group < 1:
        raise ValueError(f"{op}: pattern: wanted 0 ≤ N ≤ M and M ≥ 1, got {pattern!r}")
    for tensor in tensors:
        last = tensor.shape[-1] if tensor.dim() else 1
        if last % group:
            raise ValueError(f"{op}: pattern: wanted an M that divides the last dimension {last}, got {group}")
    return [keep, group]


def _guess(op: str, guess: Any, rows: int, segments: int) -> Tensor | None:
    if guess is None:
        return None
    thresholds = check.is_tensor(op, "guess", guess.threshold if isinstance(guess, Cut) else guess)
    if thresholds.numel() == rows * segments:
        return thresholds.reshape(rows, segments)
    check.has_shape(op, "guess", thresholds, (rows,))
    return thresholds[:, None].expand(rows, segments)

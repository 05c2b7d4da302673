"""``topk_mask``: exactly the k best coordinates, per row or over a whole list of tensors."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from ..._dispatch import Backend, choose
from .. import _checks as check
from . import reference

_OP = "topk_mask"
_BACKENDS = {"reference": Backend(reference.topk_mask)}


@overload
def topk_mask(scores: Tensor, k: int | Sequence[int] | Tensor, *, backend: str | None = None) -> Tensor: ...
@overload
def topk_mask(scores: Sequence[Tensor], k: int, *, backend: str | None = None) -> list[Tensor]: ...


def topk_mask(
    scores: Tensor | Sequence[Tensor],  # (d,), (n, d), or a list of tensors of any shape
    k: int | Sequence[int] | Tensor,  # 0 ≤ k ≤ d; for (n, d) also one per row
    *,
    backend: str | None = None,
) -> Tensor | list[Tensor]:
    """Masks (bool, the shape of ``scores``) that are True at exactly the k highest scores.

    Ties go to the lower flat index; in a list, to the earlier tensor. +0 and -0 are equal, ±inf is ordered as
    usual. The result depends on nothing else: not on the backend, the thread count or the device.

    Args:
        scores: one vector, one row per particle, or a list of tensors (fp16, bf16, fp32 or fp64, all alike on
            one device) ranked together as if flattened and concatenated.
        k: how many to keep: an int, or for (n, d) scores also n ints or an int64 tensor (n,).
        backend: ``None`` for the fastest available.

    Raises:
        TypeError: scores that are no float tensors, or k that is no integer.
        ValueError: k outside [0, d], a wrong number of ks, unlike tensors in a list, or a NaN score.
    """
    if isinstance(scores, Tensor):
        return _topk_rows(scores, k, backend)
    if not isinstance(scores, Sequence) or not scores:
        raise TypeError(f"{_OP}: scores: wanted a tensor or a non-empty list of tensors, got {scores!r:.80}")
    for i, tensor in enumerate(scores):
        check.is_tensor(_OP, f"scores[{i}]", tensor)
        check.same_device(_OP, f"scores[{i}]", tensor, scores[0].device)
        if tensor.dtype != scores[0].dtype:
            raise TypeError(f"{_OP}: scores[{i}]: wanted {scores[0].dtype} as in scores[0], got {tensor.dtype}")
    counts = _counts(k, 1, sum(tensor.numel() for tensor in scores), scores[0].device)
    return torch.ops.sfpk.topk_mask_list(list(scores), counts, backend or "")


def _topk_rows(scores: Tensor, k: int | Sequence[int] | Tensor, backend: str | None) -> Tensor:
    check.is_tensor(_OP, "scores", scores)
    if scores.dim() not in (1, 2):
        raise ValueError(f"{_OP}: scores: wanted shape (d,) or (n, d), got {tuple(scores.shape)}")
    rows = scores.unsqueeze(0) if scores.dim() == 1 else scores
    counts = _counts(k, rows.shape[0], rows.shape[1], rows.device)
    return torch.ops.sfpk.topk_mask(rows, counts, backend or "").view(scores.shape)


def _counts(k: int | Sequence[int] | Tensor, rows: int, d: int, device: torch.device) -> Tensor:
    """k as an int64 tensor (rows,); the values of a tensor k are checked by the op itself."""
    if isinstance(k, Tensor):
        if k.dtype != torch.int64:
            raise TypeError(f"{_OP}: k: wanted an int64 tensor, got {k.dtype}")
        check.has_shape(_OP, "k", k, (rows,))
        return k
    values = [k] * rows if isinstance(k, numbers.Integral) else list(k) if isinstance(k, Sequence) else None
    if values is None or any(isinstance(v, bool) or not isinstance(v, numbers.Integral) for v in values):
        raise TypeError(f"{_OP}: k: wanted an integer or one per row, got {k!r}")
    if len(values) != rows:
        raise ValueError(f"{_OP}: k: wanted {rows} values, one per row, got {len(values)}")
    _check_counts([int(v) for v in values], d)
    return torch.tensor([int(v) for v in values], dtype=torch.int64, device=device)


def _check_counts(counts: list[int], d: int) -> None:
    for row, count in enumerate(counts):
        if not 0 <= count <= d:
            raise ValueError(f"{_OP}: k: wanted 0 ≤ k ≤ {d}, got {count} in row {row}")


torch.library.define("sfpk::topk_mask", "(Tensor scores, Tensor k, str backend) -> Tensor")
torch.library.define("sfpk::topk_mask_list", "(Tensor[] scores, Tensor k, str backend) -> Tensor[]")


def _select(scores: Tensor, k: Tensor, backend: str) -> Tensor:
    counts = k.tolist()
    _check_counts(counts, scores.shape[1])
    nan_rows = torch.isnan(scores).any(dim=1)
    if nan_rows.any():
        raise ValueError(f"{_OP}: scores: wanted no NaN, got NaN in row {int(nan_rows.int().argmax())}")
    return choose(_OP, backend, _BACKENDS, scores)(scores, counts)


@torch.library.impl("sfpk::topk_mask", ("cpu", "cuda"))
def _topk_mask(scores: Tensor, k: Tensor, backend: str) -> Tensor:
    return _select(scores, k, backend)


@torch.library.impl("sfpk::topk_mask_list", ("cpu", "cuda"))
def _topk_mask_list(scores: list[Tensor], k: Tensor, backend: str) -> list[Tensor]:
    flat = torch.cat([tensor.flatten() for tensor in scores])
    mask = _select(flat.unsqueeze(0), k, backend).squeeze(0)
    parts = mask.split([tensor.numel() for tensor in scores])
    return [part.view(tensor.shape).clone() for part, tensor in zip(parts, scores, strict=True)]


@torch.library.register_fake("sfpk::topk_mask")
def _topk_mask_fake(scores: Tensor, k: Tensor, backend: str) -> Tensor:
    return torch.empty(scores.shape, dtype=torch.bool, device=scores.device)


@torch.library.register_fake("sfpk::topk_mask_list")
def _topk_mask_list_fake(scores: list[Tensor], k: Tensor, backend: str) -> list[Tensor]:
    return [torch.empty(tensor.shape, dtype=torch.bool, device=tensor.device) for tensor in scores]

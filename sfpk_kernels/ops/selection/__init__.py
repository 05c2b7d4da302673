"""``topk_mask`` and ``topk_threshold``: exactly the k best coordinates, per row or over a list of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from .. import _checks as check
from .. import _transforms as transforms
from ..packing import PACKED
from ._arguments import Call, Cut, normalize
from ._ops import BACKENDS

__all__ = ["BACKENDS", "Cut", "topk_mask", "topk_threshold"]


@overload
def topk_mask(
    values: Tensor,
    k: int | Sequence[int] | Tensor,
    *,
    score: str = ...,
    saliency: Tensor | None = ...,
    sizes: Tensor | None = ...,
    segments: Sequence[int] | None = ...,
    min_keep: int | Sequence[int] | None = ...,
    max_keep: int | Sequence[int] | None = ...,
    pattern: tuple[int, int] | None = ...,
    protected: Tensor | None = ...,
    removed: Tensor | None = ...,
    packed: str | None = ...,
    guess: Cut | Tensor | None = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def topk_mask(
    values: Sequence[Tensor],
    k: int | Sequence[int] | Tensor,
    *,
    score: str = ...,
    saliency: Sequence[Tensor] | None = ...,
    sizes: Sequence[Tensor] | None = ...,
    segments: str | None = ...,
    min_keep: int | Sequence[int] | None = ...,
    max_keep: int | Sequence[int] | None = ...,
    pattern: tuple[int, int] | None = ...,
    protected: Sequence[Tensor] | None = ...,
    removed: Sequence[Tensor] | None = ...,
    packed: str | None = ...,
    guess: Cut | Tensor | None = ...,
    backend: str | None = ...,
) -> list[Tensor]: ...
def topk_mask(
    values: Tensor | Sequence[Tensor],  # (d,), (n, d) with any row stride, or a list of tensors of any shape
    k: int | Sequence[int] | Tensor,  # 0 ≤ k ≤ d; for (n, d) also one per row
    *,
    score: str = "value",
    saliency: Tensor | Sequence[Tensor] | None = None,  # (d,) or a list like values
    sizes: Tensor | Sequence[Tensor] | None = None,  # (d,) or a list like values: integers ≥ 1
    segments: Sequence[int] | str | None = None,  # (S + 1) offsets, or "tensors" for a list
    min_keep: int | Sequence[int] | None = None,  # (S,)
    max_keep: int | Sequence[int] | None = None,  # (S,)
    pattern: tuple[int, int] | None = None,  # (N, M)
    protected: Tensor | Sequence[Tensor] | None = None,  # bool, like values or (d,)
    removed: Tensor | Sequence[Tensor] | None = None,  # bool, like values or (d,)
    packed: str | None = None,
    guess: Cut | Tensor | None = None,  # thresholds (rows,) or (rows, S)
    backend: str | None = None,
) -> Tensor | list[Tensor]:
    """Masks that are True at exactly the k highest scores.

    Ties go to the lower flat index; in a list, to the earlier tensor. +0 and -0 are equal, ±inf is ordered as
    usual. The result depends on nothing else: not on the guess, the backend, the thread count or the device.

    Args:
        values: one vector, one row per particle, or a list of tensors (fp16, bf16, fp32 or fp64, all alike on
            one device) ranked together as if flattened and concatenated.
        k: how many to keep: an int, or for (n, d) values also n ints or an int64 tensor (n,). Where a GPU backend
            finds such a tensor on the GPU and no constraints, the host waits for nothing: k is clamped to 0 … d
            and a NaN score gives that row the threshold NaN, which keeps nothing.
        score: ``"value"``: m. ``"abs"``: \\|m|. ``"abs_saliency"``: \\|m|·a. ``"value_saliency"``: m·a.
            ``"mean_abs_saliency"``: one score for all rows, (Σ_i \\|m_i|)·a·(1/n), added in order of the rows; the
            mask is (d,). All in fp32, each operation rounded once (in fp64 for fp64 values).
        saliency: a, for the scores that name it.
        sizes: how many weights each coordinate governs. k is then a budget: kept is the longest prefix of the
            ranking whose sizes sum to at most k, protected entries counted first.
        segments: offsets 0 … d of S segments; for a list only ``"tensors"``: each of them is one.
        min_keep, max_keep: how many each segment keeps at least, at most: one number for all, or S. Among the
            selections of k within these limits, the one whose kept coordinates rank highest.
        pattern: at most N are kept of each M consecutive entries along the last dimension, which M divides; the
            k best of the N best of every group.
        protected: kept always, and counted.
        removed: never kept.
        packed: ``None``: bool masks, shaped like the values. ``"uint8"`` or ``"int32"``: one bit per coordinate,
            little-endian along the last dimension, zeros behind the last one.
        guess: the expected thresholds (those of an earlier call). One read of the values suffices where they
            are within a few percent; nothing but time depends on them.
        backend: ``None`` for the fastest available.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape or range, a NaN score (the message names the row or tensor), or constraints that
            no selection satisfies (the message says which).
    """
    given = Call(
        values, k, score, saliency, sizes, segments, min_keep, max_keep, pattern, protected, removed, guess
    )  # fmt: skip
    call = normalize("topk_mask", given)
    if packed is not None:
        check.is_one_of("topk_mask", "packed", packed, PACKED)
    op = torch.ops.sfpk.topk_mask if isinstance(values, Tensor) else torch.ops.sfpk.topk_mask_list
    masks = op(*call, packed or "bool", backend or "")
    one = isinstance(values, Tensor) and (values.dim() == 1 or score == "mean_abs_saliency")
    return masks.squeeze(0) if one else masks


def topk_threshold(
    values: Tensor | Sequence[Tensor],  # (d,), (n, d) with any row stride, or a list of tensors of any shape
    k: int | Sequence[int] | Tensor,  # 0 ≤ k ≤ d; for (n, d) also one per row
    *,
    score: str = "value",
    saliency: Tensor | Sequence[Tensor] | None = None,
    sizes: Tensor | Sequence[Tensor] | None = None,
    segments: Sequence[int] | str | None = None,
    min_keep: int | Sequence[int] | None = None,
    max_keep: int | Sequence[int] | None = None,
    pattern: None = None,
    protected: Tensor | Sequence[Tensor] | None = None,
    removed: Tensor | Sequence[Tensor] | None = None,
    guess: Cut | Tensor | None = None,
    backend: str | None = None,
) -> Cut:
    """What :func:`topk_mask` keeps as a threshold and a tie cut, one per row and segment, without a mask.

    Arguments and errors are those of :func:`topk_mask`; a pattern is no threshold, so it is refused. Protected
    and removed entries are not described by the cut: kept are the protected ones, and of the others but
    the removed those the cut keeps.

    The cut is a constant to autograd, like a mask; asking for a derivative of the threshold raises NotImplementedError
    (under ``torch.compile`` the threshold is detached).

    Returns:
        Cut: (rows, S) each; threshold +inf with tie_end 0 where none is kept, -inf with tie_end d where all are.
    """
    if pattern is not None:
        raise ValueError(f"topk_threshold: pattern: wanted None, as an N:M mask is no threshold, got {pattern!r}")
    given = Call(
        values, k, score, saliency, sizes, segments, min_keep, max_keep, pattern, protected, removed, guess
    )  # fmt: skip
    call = normalize("topk_threshold", given)
    op = torch.ops.sfpk.topk_cut if isinstance(values, Tensor) else torch.ops.sfpk.topk_cut_list
    tracked = []
    if not torch.compiler.is_compiling():
        tracked = [t for t in (values if isinstance(values, Sequence) else [values]) if transforms.is_tracked(t)]
    call = call._replace(values=transforms.detached(call.values), saliency=transforms.detached(call.saliency))
    cut = Cut(*op(*call.without_pattern(), backend or ""))
    return cut._replace(threshold=transforms.underived(cut.threshold, _NO_DERIVATIVE, tracked)) if tracked else cut


_NO_DERIVATIVE = (
    "topk_threshold: threshold: wanted no derivative by the values, as none is known, but one was asked for: "
    "select from values.detach()"
)

"""``topk_mask`` and ``topk_threshold``: exactly the k best coordinates, per row or over a list of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from ..._dispatch import Backend, choose
from .. import _checks as check
from .. import _transforms as transforms
from ..packing import PACKED, mask_shape
from . import _arguments, _device, cpp, cuda, reference, triton_backend
from ._arguments import Cut
from ._selection import Selection, check_values

__all__ = ["Cut", "topk_mask", "topk_threshold"]


_BACKENDS = {
    "cpp": Backend(cpp.select, cpp.why_not),
    "cuda": Backend(cuda.select, cuda.why_not),
    "triton": Backend(triton_backend.select, triton_backend.why_not),
    "reference": Backend(reference.select),
}


def _for(selection: Selection) -> dict[str, Backend]:
    """The backends, of which those of the GPU solve less than the others."""

    def covered(backend: Backend) -> Backend:
        return Backend(backend.run, lambda values: backend.why_not(values) or _device.uncovered(selection))

    return {name: covered(backend) if name in ("cuda", "triton") else backend for name, backend in _BACKENDS.items()}


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
        score: ``"value"``: m. ``"abs"``: \\|m|. ``"abs_saliency"``: \\|m|·a. ``"mean_abs_saliency"``: one score for
            all rows, (Σ_i \\|m_i|)·a·(1/n), added in order of the rows; the mask is (d,). All in fp32, each
            operation rounded once (in fp64 for fp64 values).
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
    # fmt: off
    call = _arguments.normalize(
        "topk_mask", values, k, score=score, saliency=saliency, sizes=sizes, segments=segments, min_keep=min_keep,
        max_keep=max_keep, pattern=pattern, protected=protected, removed=removed, guess=guess,
    )
    if packed is not None:
        check.is_one_of("topk_mask", "packed", packed, PACKED)
    op = torch.ops.sfpk.topk_mask if isinstance(values, Tensor) else torch.ops.sfpk.topk_mask_list
    masks = op(
        call.values, call.k, call.score, call.saliency, call.sizes, call.segments, call.min_keep, call.max_keep,
        call.pattern, call.protected, call.removed, call.guess, packed or "bool", backend or "",
    )
    # fmt: on
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
    # fmt: off
    call = _arguments.normalize(
        "topk_threshold", values, k, score=score, saliency=saliency, sizes=sizes, segments=segments,
        min_keep=min_keep, max_keep=max_keep, pattern=None, protected=protected, removed=removed, guess=guess,
    )
    op = torch.ops.sfpk.topk_cut if isinstance(values, Tensor) else torch.ops.sfpk.topk_cut_list
    tracked = []
    if not torch.compiler.is_compiling():
        tracked = [t for t in (values if isinstance(values, Sequence) else [values]) if transforms.is_tracked(t)]
    cut = Cut(*op(
        transforms.detached(call.values), call.k, call.score, transforms.detached(call.saliency), call.sizes,
        call.segments, call.min_keep, call.max_keep, call.protected, call.removed, call.guess, backend or "",
    ))
    # fmt: on
    return cut._replace(threshold=transforms.underived(cut.threshold, _NO_DERIVATIVE, tracked)) if tracked else cut


_NO_DERIVATIVE = (
    "topk_threshold: threshold: wanted no derivative by the values, as none is known, but one was asked for: "
    "select from values.detach()"
)


_LIMITS = "SymInt[] segments, SymInt[] min_keep, SymInt[] max_keep"
_ROWS = f"Tensor values, Tensor k, str score, Tensor? saliency, Tensor? sizes, {_LIMITS}"
_LIST = f"Tensor[] values, Tensor k, str score, Tensor[]? saliency, Tensor[]? sizes, {_LIMITS}"
_ASIDE, _ASIDE_LIST = "Tensor? protected, Tensor? removed", "Tensor[]? protected, Tensor[]? removed"
_MASK = "Tensor? guess, str packed, str backend"
_CUT = "Tensor? guess, str backend) -> (Tensor, Tensor)"
torch.library.define("sfpk::topk_mask", f"({_ROWS}, SymInt[] pattern, {_ASIDE}, {_MASK}) -> Tensor")
torch.library.define("sfpk::topk_mask_list", f"({_LIST}, SymInt[] pattern, {_ASIDE_LIST}, {_MASK}) -> Tensor[]")
torch.library.define("sfpk::topk_cut", f"({_ROWS}, {_ASIDE}, {_CUT}")
torch.library.define("sfpk::topk_cut_list", f"({_LIST}, {_ASIDE_LIST}, {_CUT}")


def _solve(
    op: str,
    values: Tensor | list[Tensor],
    k: Tensor,
    score: str,
    saliency: Tensor | list[Tensor] | None,
    sizes: Tensor | list[Tensor] | None,
    segments: list[int],
    min_keep: list[int],
    max_keep: list[int],
    pattern: list[int],
    protected: Tensor | list[Tensor] | None,
    removed: Tensor | list[Tensor] | None,
    guess: Tensor | None,
    output: str,
    backend: str,
) -> tuple[Cut, list[Tensor]]:
    def listed(tensors: Tensor | list[Tensor] | None) -> list[Tensor]:
        return [] if tensors is None else [tensors] if isinstance(tensors, Tensor) else list(tensors)

    parts = listed(values)
    by_rows = isinstance(values, Tensor)
    d = parts[0].shape[1] if by_rows else sum(t.numel() for t in parts)

    def aside(masks: Tensor | list[Tensor] | None) -> list[Tensor]:
        return [m.expand(k.shape[0], d) for m in listed(masks)] if by_rows else listed(masks)

    selection = Selection(
        op=op,
        values=parts,
        by_rows=by_rows,
        k=k,
        score=score,
        saliency=listed(saliency),
        sizes=[_integers(op, t) for t in listed(sizes)],
        segments=segments or [0, d],
        min_keep=min_keep,
        max_keep=max_keep,
        pattern=(pattern[0], pattern[1]) if pattern else None,
        protected=aside(protected),
        removed=aside(removed),
        guess=guess,
        output=output,
    )
    check_values(selection)
    run = choose(op, backend, _for(selection), parts[0])
    return run(selection) if selection.rows else reference.select(selection)  # without rows there is nothing to launch


def _integers(op: str, sizes: Tensor) -> Tensor:
    if sizes.dtype == torch.int64:
        return sizes
    if not bool((sizes == sizes.round()).all()) or not bool(sizes.isfinite().all()):
        raise ValueError(f"{op}: sizes: wanted integers ≥ 1, got fractions")
    return sizes.to(torch.int64)


def _topk_mask(
    values: Tensor | list[Tensor],
    k: Tensor,
    score: str,
    saliency: Tensor | list[Tensor] | None,
    sizes: Tensor | list[Tensor] | None,
    segments: list[int],
    min_keep: list[int],
    max_keep: list[int],
    pattern: list[int],
    protected: Tensor | list[Tensor] | None,
    removed: Tensor | list[Tensor] | None,
    guess: Tensor | None,
    packed: str,
    backend: str,
) -> Tensor | list[Tensor]:
    _, masks = _solve(
        "topk_mask", values, k, score, saliency, sizes, segments, min_keep, max_keep, pattern, protected, removed,
        guess, packed, backend,
    )  # fmt: skip
    return masks[0] if isinstance(values, Tensor) else masks


def _topk_cut(
    values: Tensor | list[Tensor],
    k: Tensor,
    score: str,
    saliency: Tensor | list[Tensor] | None,
    sizes: Tensor | list[Tensor] | None,
    segments: list[int],
    min_keep: list[int],
    max_keep: list[int],
    protected: Tensor | list[Tensor] | None,
    removed: Tensor | list[Tensor] | None,
    guess: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    cut, _ = _solve(
        "topk_threshold", values, k, score, saliency, sizes, segments, min_keep, max_keep, [], protected, removed,
        guess, "cut", backend,
    )  # fmt: skip
    return cut.threshold, cut.tie_end


def _topk_mask_fake(
    values: Tensor | list[Tensor],
    k: Tensor,
    score: str,
    saliency: Tensor | list[Tensor] | None,
    sizes: Tensor | list[Tensor] | None,
    segments: list[int],
    min_keep: list[int],
    max_keep: list[int],
    pattern: list[int],
    protected: Tensor | list[Tensor] | None,
    removed: Tensor | list[Tensor] | None,
    guess: Tensor | None,
    packed: str,
    backend: str,
) -> Tensor | list[Tensor]:
    if isinstance(values, Tensor):
        shape, dtype = mask_shape((k.shape[0], values.shape[1]), packed)
        return values.new_empty(shape, dtype=dtype)
    kinds = [mask_shape(tuple(tensor.shape), packed) for tensor in values]
    return [tensor.new_empty(shape, dtype=dtype) for tensor, (shape, dtype) in zip(values, kinds, strict=True)]


def _topk_cut_fake(
    values: Tensor | list[Tensor],
    k: Tensor,
    score: str,
    saliency: Tensor | list[Tensor] | None,
    sizes: Tensor | list[Tensor] | None,
    segments: list[int],
    min_keep: list[int],
    max_keep: list[int],
    protected: Tensor | list[Tensor] | None,
    removed: Tensor | list[Tensor] | None,
    guess: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    like = values if isinstance(values, Tensor) else values[0]
    shape = (k.shape[0], max(len(segments) - 1, 1))
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return like.new_empty(shape, dtype=dtype), like.new_empty(shape, dtype=torch.int64)


for _name, _implementation, _fake in (
    ("topk_mask", _topk_mask, _topk_mask_fake),
    ("topk_mask_list", _topk_mask, _topk_mask_fake),
    ("topk_cut", _topk_cut, _topk_cut_fake),
    ("topk_cut_list", _topk_cut, _topk_cut_fake),
):
    torch.library.impl(f"sfpk::{_name}", ("cpu", "cuda"))(_implementation)
    torch.library.register_fake(f"sfpk::{_name}")(_fake)
    transforms.register_vmap(f"sfpk::{_name}", getattr(torch.ops.sfpk, _name))

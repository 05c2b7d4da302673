"""The selection ops as torch has them: schemas, implementations over the backends, fakes.

Each comes for rows of one tensor and for a list of tensors. A call has the fields of :class:`._arguments.Call`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._dispatch import Backend, choose
from .. import _transforms as transforms
from .._named import register
from ..packing import mask_shape
from . import _device, cpp, cuda, reference, triton_backend
from ._arguments import Cut
from ._selection import Selection, check_values

BACKENDS = {
    "cpp": Backend(cpp.select, cpp.why_not),
    "cuda": Backend(cuda.select, cuda.why_not),
    "triton": Backend(triton_backend.select, triton_backend.why_not),
    "reference": Backend(reference.select),
}

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


def _for(selection: Selection) -> dict[str, Backend]:
    """The backends, of which those of the GPU cover less than the others."""

    def covered(backend: Backend) -> Backend:
        return Backend(backend.run, lambda values: backend.why_not(values) or _device.uncovered(selection))

    return {name: covered(backend) if name in ("cuda", "triton") else backend for name, backend in BACKENDS.items()}


def _select(op: str, call: Any, pattern: list[int], output: str) -> tuple[Cut, list[Tensor]]:
    parts, by_rows = _listed(call.values), isinstance(call.values, Tensor)
    d = parts[0].shape[1] if by_rows else sum(t.numel() for t in parts)

    def aside(masks: Tensor | list[Tensor] | None) -> list[Tensor]:
        return [m.expand(call.k.shape[0], d) for m in _listed(masks)] if by_rows else _listed(masks)

    selection = Selection(
        op=op,
        values=parts,
        by_rows=by_rows,
        k=call.k,
        score=call.score,
        saliency=_listed(call.saliency),
        sizes=[_integers(op, t) for t in _listed(call.sizes)],
        segments=call.segments or [0, d],
        min_keep=call.min_keep,
        max_keep=call.max_keep,
        pattern=(pattern[0], pattern[1]) if pattern else None,
        protected=aside(call.protected),
        removed=aside(call.removed),
        guess=call.guess,
        output=output,
    )
    check_values(selection)
    run = choose(op, call.backend, _for(selection), parts[0])
    return run(selection) if selection.rows else reference.select(selection)  # without rows there is nothing to launch


def _listed(tensors: Tensor | list[Tensor] | None) -> list[Tensor]:
    return [] if tensors is None else [tensors] if isinstance(tensors, Tensor) else list(tensors)


def _integers(op: str, sizes: Tensor) -> Tensor:
    if sizes.dtype == torch.int64:
        return sizes
    if not bool((sizes == sizes.round()).all()) or not bool(sizes.isfinite().all()):
        raise ValueError(f"{op}: sizes: wanted integers ≥ 1, got fractions")
    return sizes.to(torch.int64)


def _topk_mask(call: Any) -> Tensor | list[Tensor]:
    _, masks = _select("topk_mask", call, call.pattern, call.packed)
    return masks[0] if isinstance(call.values, Tensor) else masks


def _topk_mask_fake(call: Any) -> Tensor | list[Tensor]:
    values: Any = call.values
    if isinstance(values, Tensor):
        shape, dtype = mask_shape((call.k.shape[0], values.shape[1]), call.packed)
        return values.new_empty(shape, dtype=dtype)
    kinds = [mask_shape(tuple(tensor.shape), call.packed) for tensor in values]
    return [tensor.new_empty(shape, dtype=dtype) for tensor, (shape, dtype) in zip(values, kinds, strict=True)]


def _topk_cut(call: Any) -> tuple[Tensor, Tensor]:
    cut, _ = _select("topk_threshold", call, [], "cut")
    return cut.threshold, cut.tie_end


def _topk_cut_fake(call: Any) -> tuple[Tensor, Tensor]:
    like = _listed(call.values)[0]
    shape = (call.k.shape[0], max(len(call.segments) - 1, 1))
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return like.new_empty(shape, dtype=dtype), like.new_empty(shape, dtype=torch.int64)


_FUNCTIONS: dict[str, Any] = {"topk_mask": (_topk_mask, _topk_mask_fake), "topk_cut": (_topk_cut, _topk_cut_fake)}
for _name, _functions in _FUNCTIONS.items():
    for _op in (_name, f"{_name}_list"):
        register(f"sfpk::{_op}", *_functions)
        transforms.register_vmap(f"sfpk::{_op}", getattr(torch.ops.sfpk, _op))

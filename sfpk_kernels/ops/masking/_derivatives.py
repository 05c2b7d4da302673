"""The derivatives of the masking ops.

θ ⊙ P, the gradient by the mask and that by the weights are the derivatives of one trilinear form,
Σ_i θ ⊙ P_i ⊙ ∂L/∂W_i, where P_i has a coordinate's value at every weight it governs: the derivatives of each op are the
other two. Through a cut the derivative by the values is the straight-through one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._transforms import Formula
from ._ops import widest

# Of a mask of factors, which has no cut.
_NO_CUT: dict[str, Any] = {"threshold": None, "tie_end": None, "score": "value", "saliency": None, "segments": []}


def _product_backward(call: Any, grads: list[Tensor], wanted: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if any(wanted.weights):
        sums = BY_WEIGHTS.like(call, weight_grads=grads, dtype=widest(*call.weights), backend="")
        found["weights"] = [total.view(w.shape).to(w.dtype) for total, w in zip(sums, call.weights, strict=True)]
    if wanted.mask:
        (by_mask,) = BY_MASK.like(call, weight_grads=_shaped(grads, call.weights), backend="")
        found["mask"] = by_mask.to(call.mask.dtype)
    return found


def _product_tangents(call: Any, tangents: Any) -> list[Tensor]:
    parts = []
    if any(t is not None for t in tangents.weights):
        parts.append(MASKED.like(call, weights=_filled(tangents.weights, call.weights), backend=""))
    if tangents.mask is not None and call.mask.is_floating_point():
        parts.append(MASKED.like(call, mask=tangents.mask, backend="", **_NO_CUT))
    n = call.mask.shape[0]
    return _added(parts) or [torch.zeros((n, w.numel()), dtype=call.dtype, device=w.device) for w in call.weights]


def _product_batch(call: Any, dims: Any, count: int) -> list[Tensor] | None:
    """Rows of all entries at once, where they share weights and saliency."""
    if any(dim is not None for dim in (*dims.weights, dims.saliency)):
        return None
    rows: dict[str, Any] = {
        name: t if t is None else _front(t, getattr(dims, name), count).flatten(0, 1)
        for name, t in (("mask", call.mask), ("threshold", call.threshold), ("tie_end", call.tie_end))
    }
    n = rows["mask"].shape[0] // count
    done = MASKED.like(call, **rows)
    return [t.view(count, n, w.numel()) for t, w in zip(done, call.weights, strict=True)]


def _by_mask_backward(call: Any, grads: list[Tensor], wanted: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    weights, weight_grads, factors = call.weights, call.weight_grads, grads[0]
    if any(wanted.weights):
        flat = [g.reshape(g.shape[0], w.numel()) for g, w in zip(weight_grads, weights, strict=True)]
        sums = BY_WEIGHTS.like(call, weight_grads=flat, mask=factors, dtype=widest(*weights), backend="", **_NO_CUT)
        found["weights"] = [total.view(w.shape).to(w.dtype) for total, w in zip(sums, weights, strict=True)]
    if any(wanted.weight_grads):
        products = MASKED.like(call, mask=factors, dtype=widest(*weight_grads), backend="", **_NO_CUT)
        found["weight_grads"] = [p.view(g.shape).to(g.dtype) for p, g in zip(products, weight_grads, strict=True)]
    return found


def _by_mask_tangents(call: Any, tangents: Any) -> list[Tensor]:
    parts = []
    for name in ("weights", "weight_grads"):
        given = getattr(tangents, name)
        if any(t is not None for t in given):
            parts.append(BY_MASK.like(call, **{name: _filled(given, getattr(call, name)), "backend": ""}))
    return _added(parts)


def _by_mask_batch(call: Any, dims: Any, count: int) -> list[Tensor] | None:
    if any(dim is not None for dim in dims.weights):
        return None
    grads = zip(call.weight_grads, dims.weight_grads, strict=True)
    (done,) = BY_MASK.like(call, weight_grads=[_front(g, dim, count).flatten(0, 1) for g, dim in grads])
    return [done.view(count, done.shape[0] // count, done.shape[1])]


def _by_weights_backward(call: Any, grads: list[Tensor], wanted: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if any(wanted.weight_grads):
        products = MASKED.like(call, weights=grads, dtype=widest(*call.weight_grads), backend="")
        found["weight_grads"] = [p.to(g.dtype) for p, g in zip(products, call.weight_grads, strict=True)]
    if wanted.mask:
        (by_mask,) = BY_MASK.like(call, weights=grads, backend="")
        found["mask"] = by_mask.to(call.mask.dtype)
    return found


def _by_weights_tangents(call: Any, tangents: Any) -> list[Tensor]:
    parts = []
    if any(t is not None for t in tangents.weight_grads):
        filled = _filled(tangents.weight_grads, call.weight_grads)
        parts.append(BY_WEIGHTS.like(call, weight_grads=filled, backend=""))
    if tangents.mask is not None and call.mask.is_floating_point():
        parts.append(BY_WEIGHTS.like(call, mask=tangents.mask, backend="", **_NO_CUT))
    return _added(parts) or [torch.zeros(g.shape[1], dtype=call.dtype, device=g.device) for g in call.weight_grads]


def _shaped(rows: list[Tensor], weights: list[Tensor]) -> list[Tensor]:  # (n, *shape) each
    return [r.reshape(r.shape[0], *w.shape) for r, w in zip(rows, weights, strict=True)]


def _filled(tangents: list[Any], tensors: list[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(x) if t is None else t for t, x in zip(tangents, tensors, strict=True)]


def _added(parts: list[list[Tensor]]) -> list[Tensor]:
    return [sum(terms[1:], start=terms[0]) for terms in zip(*parts, strict=True)]


def _front(tensor: Tensor, dim: int | None, count: int) -> Tensor:
    """The batch along dimension 0."""
    return tensor.expand(count, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


MASKED = Formula("sfpk::masked_weights", _product_backward, _product_tangents, _product_batch)
BY_MASK = Formula("sfpk::mask_gradient", _by_mask_backward, _by_mask_tangents, _by_mask_batch)
BY_WEIGHTS = Formula("sfpk::weight_gradient", _by_weights_backward, _by_weights_tangents, lambda *_: None)
for _formula in (MASKED, BY_MASK, BY_WEIGHTS):
    _formula.register()

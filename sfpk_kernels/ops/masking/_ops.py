"""The masking ops as torch has them: schemas, implementations over the backends, fakes."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..._dispatch import Backend, choose
from .. import _checks as check
from .. import layout as layouts
from .._named import register
from . import cpp, cuda, reference, triton_backend
from ._arguments import Mask

PRODUCT, GRADIENT = "masked_weights", "mask_gradient"  # as messages name the ops

_MODULES = {"cpp": cpp, "cuda": cuda, "triton": triton_backend}
BACKENDS = {
    **{name: Backend(module.masked_weights_, module.why_not) for name, module in _MODULES.items()},
    "reference": Backend(reference.masked_weights_),
}
GRADIENT_BACKENDS = {
    **{name: Backend(module.mask_gradient_, module.why_not) for name, module in _MODULES.items()},
    "reference": Backend(reference.mask_gradient_),
}

_RANKING = "Tensor? threshold, Tensor? tie_end, str score, Tensor? saliency, SymInt[] segments, SymInt[] layout"
_LAST = "str backend, SymInt? coordinates=None"
torch.library.define(
    "sfpk::masked_weights", f"(Tensor[] weights, Tensor mask, {_RANKING}, ScalarType dtype, {_LAST}) -> Tensor[]"
)
torch.library.define(
    "sfpk::masked_weights_out", f"(Tensor[] weights, Tensor mask, {_RANKING}, Tensor(a!)[] out, {_LAST}) -> ()"
)
torch.library.define(
    "sfpk::mask_gradient", f"(Tensor[] weights, Tensor[] weight_grads, SymInt[] layout, {_LAST}) -> Tensor"
)
# Σ_i P_i ⊙ ∂L/∂W_i: the third derivative of Σ_i θ ⊙ P_i ⊙ ∂L/∂W_i, beside the two ops above.
torch.library.define(
    "sfpk::weight_gradient", f"(Tensor[] weight_grads, Tensor mask, {_RANKING}, ScalarType dtype, {_LAST}) -> Tensor[]"
)


def widest(*tensors: Tensor) -> torch.dtype:
    """fp64 where one of them is, else fp32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _kinds(*tensors: Tensor) -> list[Tensor]:
    """One of each device and dtype: what these backends ask for."""
    return list({(t.device, t.dtype): t for t in tensors}.values())


@functools.lru_cache(maxsize=64)
def _pieces(layout: tuple[int, ...], sizes: tuple[int, ...]) -> list[layouts.Piece]:
    pieces = layouts.pieces(layout, sizes)
    assert pieces is not None
    return pieces


@functools.lru_cache(maxsize=64)
def _sharing(layout: tuple[int, ...], sizes: tuple[int, ...], d: int) -> layouts.Sharing:
    return layouts.sharing(_pieces(layout, sizes), d)


def _coordinates(call: Any, sizes: list[int]) -> int:
    return layouts.count(call.layout, sizes) if call.coordinates is None else call.coordinates


def _sizes(tensors: list[Tensor]) -> list[int]:
    return [t.numel() for t in tensors]


def _run(
    weights: list[Tensor],
    call: Any,  # of the ops with a mask
    outs: list[Tensor],  # (n, numel) each
) -> None:
    sizes = _sizes(weights)
    pieces, d = _pieces(tuple(call.layout), tuple(sizes)), _coordinates(call, sizes)
    mask = Mask(call.mask, d, call.threshold, call.tie_end, call.score, call.saliency, list(call.segments) or [0, d])
    run = choose(PRODUCT, call.backend, BACKENDS, call.mask, *_kinds(*weights, *outs))
    flat = [t.flatten().contiguous() for t in weights]
    run([p.of(flat[p.tensor]) for p in pieces], mask, pieces, [p.of(outs[p.tensor]) for p in pieces])


def _new_rows(n: int, weights: list[Tensor], dtype: torch.dtype) -> list[Tensor]:  # (n, numel) each
    return [torch.empty((n, t.numel()), dtype=dtype, device=t.device) for t in weights]


def _masked_weights(call: Any) -> list[Tensor]:
    outs = _masked_weights_fake(call)
    _run(call.weights, call, outs)
    return outs


def _masked_weights_fake(call: Any) -> list[Tensor]:
    return _new_rows(call.mask.shape[0], call.weights, call.dtype)


def _masked_weights_out(call: Any) -> None:
    weights, mask, out = call.weights, call.mask, call.out
    names = [*((f"weights[{i}]" if len(weights) > 1 else "weights", t) for i, t in enumerate(weights)), ("mask", mask)]
    for i, buffer in enumerate(out):
        check.owns_memory(PRODUCT, f"out[{i}]" if len(out) > 1 else "out", buffer)
        for name, tensor in names:
            if check.share_memory(buffer, tensor):
                raise ValueError(f"{PRODUCT}: out: wanted memory of its own, got memory shared with {name}")
    rows = [_as_rows(buffer, mask.shape[0], weight.numel()) for buffer, weight in zip(out, weights, strict=True)]
    with check.writing(*out):
        _run(weights, call, rows)
        for buffer, row in zip(out, rows, strict=True):
            if row.data_ptr() != buffer.data_ptr():
                buffer.copy_(row.view(buffer.shape))
    check.was_written(*out)


def _as_rows(out: Tensor, n: int, count: int) -> Tensor:  # (n, count)
    """A view of ``out``, or a buffer of its own where no one stride leads through a row."""
    try:
        return out.view(n, count)
    except RuntimeError:
        return torch.empty((n, count), dtype=out.dtype, device=out.device)


def _mask_gradient(call: Any) -> Tensor:
    weights, grads = call.weights, call.weight_grads
    sizes = _sizes(weights)
    n, d, dtype = grads[0].shape[0], _coordinates(call, sizes), widest(*weights, *grads)
    exact = dtype == torch.float64
    parts = _sharing(tuple(call.layout), tuple(sizes), d)
    new = torch.empty if parts.covers and not exact else torch.zeros
    out = new((n, d), dtype=dtype, device=weights[0].device)
    run = choose(GRADIENT, call.backend, GRADIENT_BACKENDS, out, *_kinds(*weights, *grads))
    flat = [(t.to(dtype) if exact else t).flatten().contiguous() for t in weights]
    rows = [g.reshape(n, t.numel()) for g, t in zip(grads, weights, strict=True)]

    def collect(pieces: list[layouts.Piece], into: Tensor) -> None:
        run([p.of(flat[p.tensor]) for p in pieces], [p.of(rows[p.tensor]) for p in pieces], pieces, into)

    if exact:
        collect(_pieces(tuple(call.layout), tuple(sizes)), out)
        return out
    if parts.alone:
        collect(parts.alone, out)
    if parts.shared:
        sums = torch.zeros((n, parts.size), dtype=torch.float64, device=out.device)
        collect(parts.shared, sums)
        for coordinates, places in parts.places:
            out[:, coordinates] = sums[:, places]
    return out


def _mask_gradient_fake(call: Any) -> Tensor:
    shape = (call.weight_grads[0].shape[0], _coordinates(call, _sizes(call.weights)))
    return torch.empty(shape, dtype=widest(*call.weights, *call.weight_grads), device=call.weights[0].device)


def _weight_gradient(call: Any) -> list[Tensor]:  # (numel,) each, of weight_grads (n, numel)
    factors = call.threshold is None and call.mask.dtype == torch.float64
    exact = torch.float64 in (call.dtype, *(g.dtype for g in call.weight_grads)) or factors
    wide = torch.float64 if exact else torch.float32
    totals = [torch.zeros(g.shape[1], dtype=wide, device=g.device) for g in call.weight_grads]
    row = _new_rows(1, totals, wide)
    for i in range(call.mask.shape[0]):
        # The row's gradient takes the place of the weights.
        threshold, tie_end = (t if t is None else t[i : i + 1] for t in (call.threshold, call.tie_end))
        of_row = call._replace(mask=call.mask[i : i + 1], threshold=threshold, tie_end=tie_end)
        _run([g[i] for g in call.weight_grads], of_row, row)
        for total, part in zip(totals, row, strict=True):
            total += part[0]
    return [total.to(call.dtype) for total in totals]


def _weight_gradient_fake(call: Any) -> list[Tensor]:
    return [torch.empty(g.shape[1], dtype=call.dtype, device=g.device) for g in call.weight_grads]


register("sfpk::masked_weights", _masked_weights, _masked_weights_fake)
register("sfpk::masked_weights_out", _masked_weights_out, lambda call: None)
register("sfpk::mask_gradient", _mask_gradient, _mask_gradient_fake)
register("sfpk::weight_gradient", _weight_gradient, _weight_gradient_fake)

"""``masked_weights``: θ ⊙ mask for one mask or one per particle; ``mask_gradient``: its derivative by the mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from ..._dispatch import Backend, choose
from .. import _checks as check
from .. import _transforms as transforms
from ..codes import ENTRY_SCORES
from ..selection import Cut
from ..selection._arguments import segment_borders
from . import _layout, cpp, cuda, reference, triton_backend
from ._layout import Blocks, Mask

__all__ = ["Blocks", "mask_gradient", "masked_weights"]

_OP, _GRADIENT = "masked_weights", "mask_gradient"
_BACKENDS = {
    "cpp": Backend(cpp.masked_weights_, cpp.why_not),
    "cuda": Backend(cuda.masked_weights_, cuda.why_not),
    "triton": Backend(triton_backend.masked_weights_, triton_backend.why_not),
    "reference": Backend(reference.masked_weights_),
}
_GRADIENT_BACKENDS = {
    "cpp": Backend(cpp.mask_gradient_, cpp.why_not),
    "cuda": Backend(cuda.mask_gradient_, cuda.why_not),
    "triton": Backend(triton_backend.mask_gradient_, triton_backend.why_not),
    "reference": Backend(reference.mask_gradient_),
}


@overload
def masked_weights(
    weights: Tensor,
    mask: Tensor,
    *,
    cut: Cut | None = ...,
    score: str | None = ...,
    saliency: Tensor | None = ...,
    segments: Sequence[int] | None = ...,
    layout: Blocks | Sequence[Blocks] | None = ...,
    dtype: torch.dtype | None = ...,
    out: Tensor | None = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def masked_weights(
    weights: Sequence[Tensor],
    mask: Tensor,
    *,
    cut: Cut | None = ...,
    score: str | None = ...,
    saliency: Tensor | None = ...,
    segments: Sequence[int] | str | None = ...,
    layout: Sequence[Blocks] | None = ...,
    dtype: torch.dtype | None = ...,
    out: Sequence[Tensor] | None = ...,
    backend: str | None = ...,
) -> list[Tensor]: ...
def masked_weights(
    weights: Tensor | Sequence[Tensor],  # (W,), or a list of tensors of any shape, W weights together
    mask: Tensor,  # (d,) or (n, d): bool, float factors, or particle values with cut; packed (n, units)
    *,
    cut: Cut | None = None,  # (n, S)
    score: str | None = None,
    saliency: Tensor | None = None,  # (d,)
    segments: Sequence[int] | str | None = None,  # (S + 1) offsets; for a list without layout also "tensors"
    layout: Blocks | Sequence[Blocks] | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | Sequence[Tensor] | None = None,  # the shape of the result
    backend: str | None = None,
) -> Tensor | list[Tensor]:  # (W,) or (n, W); for a list, each tensor's shape, with n in front
    """θ ⊙ mask, row by row; where a mask removes a weight the result is exactly 0, whatever the weight was.

    Differentiable (not with ``out``) in ``weights``: the masked gradient, summed over rows; and in a float ``mask``,
    by :func:`mask_gradient`: for factors the derivative, for particle values with a cut the straight-through one, as if
    the mask were the values (∂P/∂m = 1 for the P that is kept by the cut). Derivatives of any order follow the same
    rule, so they are those of a product; backward, forward (``torch.func.jvp``) and under ``torch.func.vmap``. The cut
    and the saliency have none. (``is_grads_batched``, torch's old vmap, raises.)

    Args:
        weights: the dense weights, flat or as the tensors of a model; their coordinates follow one another.
        mask: bool, 1/True = keep. uint8 or int32: packed bits, as of :func:`pack_mask`. Float without ``cut``:
            factors. Float with ``cut``: particle values, of which the cut says which are kept; no mask is
            written then.
        cut: of :func:`topk_threshold` for the same values, score, saliency and segments. A NaN score is not kept.
        score, saliency: ``"value"``, ``"abs"`` or ``"abs_saliency"``, as in :func:`topk_threshold`; ``None`` for
            ``"value"``.
        segments: those of the cut: offsets over all coordinates; ``"tensors"``: each tensor of a list is one, which a
            layout has no use for.
        layout: structured: which weights each coordinate governs, as consecutive :class:`Blocks`, each within
            one tensor. ``None``: one coordinate per weight.
        dtype: of the result; ``None`` for that of ``weights``. Not together with ``out``.
        out: buffers to write into (any float dtype and row stride); returned.
        backend: ``None`` for the fastest available.

    Products of factors are formed in fp32 (fp64 where an input is), rounded once, then rounded to ``dtype``.

    Raises:
        TypeError: an argument that is no tensor of a fitting dtype, or dtype and out together.
        ValueError: shapes, devices, layout or segments that do not fit, ``out`` sharing memory with an input or with
            itself, or inputs beside it that record a gradient.
    """
    tensors = _weights(_OP, weights)
    device, is_list = tensors[0].device, not isinstance(weights, Tensor)
    sizes = [t.numel() for t in tensors]
    flat = _layout.normalize(_OP, layout, sizes)
    d = _layout.count(flat, sizes)
    _layout.check_mask(_OP, mask, d, device)
    rows = mask if mask.dim() == 2 else mask[None]
    # fmt: off
    ranking = _cut(mask, rows, cut, score, saliency, segments, d, [] if flat else tensors if is_list else [])
    shapes = [tuple(t.shape) if mask.dim() == 1 else (mask.shape[0], *t.shape) for t in tensors]
    if out is None:
        dtype = tensors[0].dtype if dtype is None else dtype
        if dtype not in check.FLOATS:
            raise TypeError(f"{_OP}: dtype: wanted a float dtype, got {dtype}")
        done = _PRODUCT(tensors, rows, *ranking, flat, dtype, backend or "")
        results = [t.view(shape) for t, shape in zip(done, shapes, strict=True)]
        return results if is_list else results[0]
    # fmt: on
    if dtype is not None:
        raise TypeError(f"{_OP}: dtype: wanted None together with out, got {dtype}")
    buffers = [out] if isinstance(out, Tensor) else list(out)
    if is_list == isinstance(out, Tensor) or len(buffers) != len(tensors):
        raise TypeError(
            f"{_OP}: out: wanted {len(tensors) if is_list else 'one'} tensor(s) like weights, got {out!r:.80}"
        )
    for i, (buffer, shape) in enumerate(zip(buffers, shapes, strict=True)):
        name = f"out[{i}]" if is_list else "out"
        check.is_tensor(_OP, name, buffer)
        check.has_shape(_OP, name, buffer, shape)
        check.same_device(_OP, name, buffer, device)
    named = [*((f"weights[{i}]" if is_list else "weights", t) for i, t in enumerate(tensors)), ("mask", mask)]
    transforms.refuse_derivatives(_OP, "a result written into out has no derivative", named)
    torch.ops.sfpk.masked_weights_out(tensors, rows, *ranking, flat, buffers, backend or "")
    return out if isinstance(out, Tensor) else buffers


def mask_gradient(
    weights: Tensor | Sequence[Tensor],  # (W,), or a list of tensors
    weight_grads: Tensor | Sequence[Tensor],  # ∂L/∂W_i: the shapes of weights, or with n in front
    *,
    layout: Blocks | Sequence[Blocks] | None = None,
    backend: str | None = None,
) -> Tensor:  # (d,) or (n, d) fp32, fp64 where an input is
    """The gradient by the mask, straight through the polarizer: Σ_{w in e} θ_w · ∂L/∂W_w for every coordinate e.

    Products in the result's dtype, sums in fp64. Differentiable in both arguments, like :func:`masked_weights`. (For
    single weights ``transition_(weights=θ)`` forms the same product without writing it.)

    Source: method step 2; the chain rule of W = P ⊙ θ with ∂P/∂m = 1.

    Raises:
        TypeError: an argument that is no float tensor, or a list beside a tensor.
        ValueError: shapes, devices or a layout that do not fit.
    """
    tensors = _weights(_GRADIENT, weights)
    is_list = not isinstance(weights, Tensor)
    if is_list == isinstance(weight_grads, Tensor):
        wanted = "a list of tensors" if is_list else "a tensor"
        raise TypeError(f"{_GRADIENT}: weight_grads: wanted {wanted}, got {type(weight_grads).__name__}")
    grads: list[Any] = list(weight_grads) if is_list else [weight_grads]
    if len(grads) != len(tensors):
        raise ValueError(f"{_GRADIENT}: weight_grads: wanted {len(tensors)} tensors, got {len(grads)}")
    batched = isinstance(grads[0], Tensor) and grads[0].dim() == tensors[0].dim() + 1
    for i, (weight, grad) in enumerate(zip(tensors, grads, strict=True)):
        name = f"weight_grads[{i}]" if is_list else "weight_grads"
        check.is_tensor(_GRADIENT, name, grad)
        check.has_shape(_GRADIENT, name, grad, (*grads[0].shape[:1], *weight.shape) if batched else tuple(weight.shape))
        check.same_device(_GRADIENT, name, grad, weight.device)
    flat = _layout.normalize(_GRADIENT, layout, [t.numel() for t in tensors])
    rows = [g if batched else g[None] for g in grads]
    (result,) = _BY_MASK(tensors, rows, flat, backend or "")
    return result if batched else result[0]


def _weights(op: str, weights: Any) -> list[Tensor]:
    tensors = [weights] if isinstance(weights, Tensor) else weights
    if not isinstance(tensors, Sequence) or not tensors:
        raise TypeError(f"{op}: weights: wanted a tensor or a non-empty list of tensors, got {weights!r:.80}")
    for i, tensor in enumerate(tensors):
        name = "weights" if isinstance(weights, Tensor) else f"weights[{i}]"
        check.is_tensor(op, name, tensor)
        check.same_device(op, name, tensor, tensors[0].device)
    if isinstance(weights, Tensor) and weights.dim() != 1:
        raise ValueError(f"{op}: weights: wanted shape (d,), got {tuple(weights.shape)}")
    return list(tensors)


def _cut(
    mask: Tensor,
    rows: Tensor,  # (n, d)
    cut: Any,
    score: str | None,
    saliency: Any,
    segments: Any,
    d: int,
    tensors: list[Tensor],  # what "tensors" means; empty where it means nothing
) -> tuple[Tensor | None, Tensor | None, str, Tensor | None, list[int]]:
    """The cut's part of the op's arguments."""
    if cut is None:
        for name, value in (("score", score), ("saliency", saliency), ("segments", segments)):
            if value is not None:
                raise ValueError(f"{_OP}: {name}: wanted None without a cut, got {value!r:.80}")
        return None, None, "value", None, []
    if not isinstance(cut, tuple) or len(cut) != 2:
        raise TypeError(f"{_OP}: cut: wanted a Cut(threshold, tie_end), got {cut!r:.80}")
    if not mask.is_floating_point():
        raise TypeError(f"{_OP}: mask: wanted float particle values beside a cut, got {mask.dtype}")
    score = "value" if score is None else score
    check.is_one_of(_OP, "score", score, ENTRY_SCORES)
    borders = segment_borders(_OP, segments, tensors or None, d, offsets=True)
    for name, tensor, dtypes in (
        ("cut.threshold", cut[0], check.FLOATS),
        ("cut.tie_end", cut[1], (torch.int64,)),
    ):
        check.is_tensor(_OP, name, tensor, dtypes)
        check.has_shape(_OP, name, tensor, (rows.shape[0], max(len(borders) - 1, 1)))
        check.same_device(_OP, name, tensor, mask.device)
    if (saliency is None) == (score == "abs_saliency"):
        wanted = "values to multiply with" if saliency is None else "None"
        raise ValueError(f"{_OP}: saliency: wanted {wanted} with score={score!r}, got {saliency!r:.80}")
    if saliency is not None:
        check.is_tensor(_OP, "saliency", saliency)
        check.has_shape(_OP, "saliency", saliency, (d,))
        check.same_device(_OP, "saliency", saliency, mask.device)
    return cut[0], cut[1], score, saliency, borders


_RANKING = "Tensor? threshold, Tensor? tie_end, str score, Tensor? saliency, SymInt[] segments, SymInt[] layout"
torch.library.define(
    "sfpk::masked_weights",
    f"(Tensor[] weights, Tensor mask, {_RANKING}, ScalarType dtype, str backend) -> Tensor[]",
)
torch.library.define(
    "sfpk::masked_weights_out",
    f"(Tensor[] weights, Tensor mask, {_RANKING}, Tensor(a!)[] out, str backend) -> ()",
)
torch.library.define(
    "sfpk::mask_gradient", "(Tensor[] weights, Tensor[] weight_grads, SymInt[] layout, str backend) -> Tensor"
)
# Σ_i P_i ⊙ ∂L/∂W_i: the third derivative of Σ_i θ ⊙ P_i ⊙ ∂L/∂W_i, beside the two ops above.
torch.library.define(
    "sfpk::weight_gradient",
    f"(Tensor[] weight_grads, Tensor mask, {_RANKING}, ScalarType dtype, str backend) -> Tensor[]",
)


def _run(
    weights: list[Tensor],
    mask: Tensor,  # (n, d)
    ranking: tuple[Any, ...],  # threshold, tie_end, score, saliency, segments, layout
    outs: list[Tensor],  # (n, numel) each
    backend: str,
) -> None:
    threshold, tie_end, score, saliency, segments, layout = ranking
    sizes = [t.numel() for t in weights]
    pieces, d = _layout.pieces(layout, sizes), _layout.count(layout, sizes)
    assert pieces is not None
    described = Mask(mask, d, threshold, tie_end, score, saliency, list(segments) or [0, d])
    run = choose(_OP, backend, _BACKENDS, mask, *weights, *outs)
    flat = [t.flatten().contiguous() for t in weights]
    run([p.of(flat[p.tensor]) for p in pieces], described, pieces, [p.of(outs[p.tensor]) for p in pieces])


def _new_rows(n: int, weights: list[Tensor], dtype: torch.dtype) -> list[Tensor]:  # (n, numel) each
    return [torch.empty((n, t.numel()), dtype=dtype, device=t.device) for t in weights]


def _masked_weights(
    weights: list[Tensor],
    mask: Tensor,
    threshold: Tensor | None,
    tie_end: Tensor | None,
    score: str,
    saliency: Tensor | None,
    segments: list[int],
    layout: list[int],
    dtype: torch.dtype,
    backend: str,
) -> list[Tensor]:
    outs = _new_rows(mask.shape[0], weights, dtype)
    _run(weights, mask, (threshold, tie_end, score, saliency, segments, layout), outs, backend)
    return outs


def _masked_weights_out(
    weights: list[Tensor],
    mask: Tensor,
    threshold: Tensor | None,
    tie_end: Tensor | None,
    score: str,
    saliency: Tensor | None,
    segments: list[int],
    layout: list[int],
    out: list[Tensor],
    backend: str,
) -> None:
    names = [*((f"weights[{i}]" if len(weights) > 1 else "weights", t) for i, t in enumerate(weights)), ("mask", mask)]
    for i, buffer in enumerate(out):
        check.owns_memory(_OP, f"out[{i}]" if len(out) > 1 else "out", buffer)
        for name, tensor in names:
            if check.share_memory(buffer, tensor):
                raise ValueError(f"{_OP}: out: wanted memory of its own, got memory shared with {name}")
    rows = [_as_rows(buffer, mask.shape[0], weight.numel()) for buffer, weight in zip(out, weights, strict=True)]
    with check.writing(*out):
        _run(weights, mask, (threshold, tie_end, score, saliency, segments, layout), rows, backend)
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


def _mask_gradient(weights: list[Tensor], weight_grads: list[Tensor], layout: list[int], backend: str) -> Tensor:
    sizes = [t.numel() for t in weights]
    pieces = _layout.pieces(layout, sizes)
    assert pieces is not None
    out = _gradient_buffer(weights, weight_grads, layout)
    run = choose(_GRADIENT, backend, _GRADIENT_BACKENDS, out, *weights, *weight_grads)
    flat = [t.flatten().contiguous() for t in weights]
    rows = [g.reshape(g.shape[0], t.numel()) for g, t in zip(weight_grads, weights, strict=True)]
    run([p.of(flat[p.tensor]) for p in pieces], [p.of(rows[p.tensor]) for p in pieces], pieces, out)
    return out


def _gradient_buffer(weights: list[Tensor], weight_grads: list[Tensor], layout: list[int]) -> Tensor:
    dtypes = {t.dtype for t in (*weights, *weight_grads)}
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    d = _layout.count(layout, [t.numel() for t in weights])
    return torch.empty((weight_grads[0].shape[0], d), dtype=dtype, device=weights[0].device)


def _weight_gradient(
    weight_grads: list[Tensor],  # (n, numel) each
    mask: Tensor,
    threshold: Tensor | None,
    tie_end: Tensor | None,
    score: str,
    saliency: Tensor | None,
    segments: list[int],
    layout: list[int],
    dtype: torch.dtype,
    backend: str,
) -> list[Tensor]:  # (numel,) each
    exact = torch.float64 in (dtype, mask.dtype if threshold is None else dtype, *(g.dtype for g in weight_grads))
    wide = torch.float64 if exact else torch.float32
    totals = [torch.zeros(g.shape[1], dtype=wide, device=g.device) for g in weight_grads]
    row = _new_rows(1, totals, wide)
    for i in range(mask.shape[0]):
        # The row's gradient takes the place of the weights.
        cut = (t if t is None else t[i : i + 1] for t in (threshold, tie_end))
        _run([g[i] for g in weight_grads], mask[i : i + 1], (*cut, score, saliency, segments, layout), row, backend)
        for total, part in zip(totals, row, strict=True):
            total += part[0]
    return [total.to(dtype) for total in totals]


torch.library.impl("sfpk::masked_weights", ("cpu", "cuda"))(_masked_weights)
torch.library.impl("sfpk::masked_weights_out", ("cpu", "cuda"))(_masked_weights_out)
torch.library.impl("sfpk::mask_gradient", ("cpu", "cuda"))(_mask_gradient)
torch.library.impl("sfpk::weight_gradient", ("cpu", "cuda"))(_weight_gradient)


@torch.library.register_fake("sfpk::masked_weights")
def _masked_weights_fake(
    weights: list[Tensor],
    mask: Tensor,
    threshold: Tensor | None,
    tie_end: Tensor | None,
    score: str,
    saliency: Tensor | None,
    segments: list[int],
    layout: list[int],
    dtype: torch.dtype,
    backend: str,
) -> list[Tensor]:
    return _new_rows(mask.shape[0], weights, dtype)


@torch.library.register_fake("sfpk::masked_weights_out")
def _masked_weights_out_fake(
    weights: list[Tensor],
    mask: Tensor,
    threshold: Tensor | None,
    tie_end: Tensor | None,
    score: str,
    saliency: Tensor | None,
    segments: list[int],
    layout: list[int],
    out: list[Tensor],
    backend: str,
) -> None:
    return None


@torch.library.register_fake("sfpk::mask_gradient")
def _mask_gradient_fake(weights: list[Tensor], weight_grads: list[Tensor], layout: list[int], backend: str) -> Tensor:
    return _gradient_buffer(weights, weight_grads, layout)


@torch.library.register_fake("sfpk::weight_gradient")
def _weight_gradient_fake(
    weight_grads: list[Tensor],
    mask: Tensor,
    threshold: Tensor | None,
    tie_end: Tensor | None,
    score: str,
    saliency: Tensor | None,
    segments: list[int],
    layout: list[int],
    dtype: torch.dtype,
    backend: str,
) -> list[Tensor]:
    return [torch.empty(g.shape[1], dtype=dtype, device=g.device) for g in weight_grads]


# The three ops are the derivatives of one trilinear form, Σ_i θ ⊙ P_i ⊙ ∂L/∂W_i: the derivatives of each are the
# others. Ranking: what follows the mask, from the cut to the layout; without a cut, as for factors, none.
_FACTORS: tuple[Any, ...] = (None, None, "value", None, [])


def _product_backward(arguments: list[Any], grads: list[Tensor], wanted: list[Any]) -> list[Any]:
    weights, mask, *ranking, layout, _, _ = arguments
    by_weights: Any = [None] * len(weights)
    by_mask = None
    if any(wanted[0]):
        wide = _widest(*weights)
        sums = _BY_WEIGHTS(grads, mask, *ranking, layout, wide, "")
        by_weights = [total.view(w.shape).to(w.dtype) for total, w in zip(sums, weights, strict=True)]
    if wanted[1]:
        (by_mask,) = _BY_MASK(weights, _shaped(grads, weights), layout, "")
        by_mask = by_mask.to(mask.dtype)
    return [by_weights, by_mask, *[None] * 8]


def _product_tangents(arguments: list[Any], tangents: list[Any]) -> list[Tensor]:
    weights, mask, *ranking, layout, dtype, _ = arguments
    parts = []
    if any(t is not None for t in tangents[0]):
        parts.append(_PRODUCT(_filled(tangents[0], weights), mask, *ranking, layout, dtype, ""))
    if tangents[1] is not None and mask.is_floating_point():
        parts.append(_PRODUCT(weights, tangents[1], *_FACTORS, layout, dtype, ""))
    return _added(parts) or [torch.zeros((mask.shape[0], w.numel()), dtype=dtype, device=w.device) for w in weights]


def _product_batch(arguments: list[Any], dims: list[Any], count: int) -> list[Tensor] | None:
    """Rows of all entries at once, where they share weights and saliency."""
    weights, mask, threshold, tie_end, score, saliency, *rest = arguments
    if any(dim is not None for dim in (*dims[0], dims[5])):
        return None
    rows = _front(mask, dims[1], count).flatten(0, 1)
    threshold, tie_end = (
        t if t is None else _front(t, dim, count).flatten(0, 1)
        for t, dim in zip((threshold, tie_end), dims[2:4], strict=True)
    )
    done = _PRODUCT(weights, rows, threshold, tie_end, score, saliency, *rest)
    return [t.view(count, rows.shape[0] // count, w.numel()) for t, w in zip(done, weights, strict=True)]


def _by_mask_backward(arguments: list[Any], grads: list[Tensor], wanted: list[Any]) -> list[Any]:
    weights, weight_grads, layout, _ = arguments
    factors = grads[0]
    by_weights: Any = [None] * len(weights)
    by_grads: Any = [None] * len(weights)
    if any(wanted[0]):
        flat = [g.reshape(g.shape[0], w.numel()) for g, w in zip(weight_grads, weights, strict=True)]
        sums = _BY_WEIGHTS(flat, factors, *_FACTORS, layout, _widest(*weights), "")
        by_weights = [total.view(w.shape).to(w.dtype) for total, w in zip(sums, weights, strict=True)]
    if any(wanted[1]):
        products = _PRODUCT(weights, factors, *_FACTORS, layout, _widest(*weight_grads), "")
        by_grads = [p.view(g.shape).to(g.dtype) for p, g in zip(products, weight_grads, strict=True)]
    return [by_weights, by_grads, None, None]


def _by_mask_tangents(arguments: list[Any], tangents: list[Any]) -> list[Tensor]:
    weights, weight_grads, layout, _ = arguments
    parts = []
    if any(t is not None for t in tangents[0]):
        parts.append(_BY_MASK(_filled(tangents[0], weights), weight_grads, layout, ""))
    if any(t is not None for t in tangents[1]):
        parts.append(_BY_MASK(weights, _filled(tangents[1], weight_grads), layout, ""))
    return _added(parts)


def _by_mask_batch(arguments: list[Any], dims: list[Any], count: int) -> list[Tensor] | None:
    weights, weight_grads, layout, backend = arguments
    if any(dim is not None for dim in dims[0]):
        return None
    rows = [_front(g, dim, count).flatten(0, 1) for g, dim in zip(weight_grads, dims[1], strict=True)]
    (done,) = _BY_MASK(weights, rows, layout, backend)
    return [done.view(count, done.shape[0] // count, done.shape[1])]


def _by_weights_backward(arguments: list[Any], grads: list[Tensor], wanted: list[Any]) -> list[Any]:
    weight_grads, mask, *ranking, layout, _, _ = arguments
    by_grads: Any = [None] * len(weight_grads)
    by_mask = None
    if any(wanted[0]):
        products = _PRODUCT(grads, mask, *ranking, layout, _widest(*weight_grads), "")
        by_grads = [p.to(g.dtype) for p, g in zip(products, weight_grads, strict=True)]
    if wanted[1]:
        (by_mask,) = _BY_MASK(grads, weight_grads, layout, "")
        by_mask = by_mask.to(mask.dtype)
    return [by_grads, by_mask, *[None] * 8]


def _by_weights_tangents(arguments: list[Any], tangents: list[Any]) -> list[Tensor]:
    weight_grads, mask, *ranking, layout, dtype, _ = arguments
    parts = []
    if any(t is not None for t in tangents[0]):
        parts.append(_BY_WEIGHTS(_filled(tangents[0], weight_grads), mask, *ranking, layout, dtype, ""))
    if tangents[1] is not None and mask.is_floating_point():
        parts.append(_BY_WEIGHTS(weight_grads, tangents[1], *_FACTORS, layout, dtype, ""))
    return _added(parts) or [torch.zeros(g.shape[1], dtype=dtype, device=g.device) for g in weight_grads]


def _widest(*tensors: Tensor) -> torch.dtype:
    """fp64 where one of them is, else fp32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _shaped(rows: list[Tensor], weights: list[Tensor]) -> list[Tensor]:  # (n, *shape) each
    return [r.reshape(r.shape[0], *w.shape) for r, w in zip(rows, weights, strict=True)]


def _filled(tangents: list[Any], tensors: list[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(x) if t is None else t for t, x in zip(tangents, tensors, strict=True)]


def _added(parts: list[list[Tensor]]) -> list[Tensor]:
    return [sum(terms[1:], start=terms[0]) for terms in zip(*parts, strict=True)]


def _front(tensor: Tensor, dim: int | None, count: int) -> Tensor:
    """The batch along dimension 0."""
    return tensor.expand(count, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


_PRODUCT = transforms.Formula(torch.ops.sfpk.masked_weights, _product_backward, _product_tangents, _product_batch)
_BY_MASK = transforms.Formula(torch.ops.sfpk.mask_gradient, _by_mask_backward, _by_mask_tangents, _by_mask_batch)
_BY_WEIGHTS = transforms.Formula(
    torch.ops.sfpk.weight_gradient, _by_weights_backward, _by_weights_tangents, lambda *_: None
)
_PRODUCT.register("sfpk::masked_weights")
_BY_MASK.register("sfpk::mask_gradient")
_BY_WEIGHTS.register("sfpk::weight_gradient")

"""``masked_weights``: θ ⊙ mask for one mask or one per particle; ``mask_gradient``: its derivative by the mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from ..._dispatch import Backend, choose
from .. import _checks as check
from ..selection import Cut
from ..selection._arguments import segment_borders
from . import _layout, cpp, cuda, reference, triton_backend
from ._layout import Blocks, Mask

__all__ = ["Blocks", "mask_gradient", "masked_weights"]

_OP, _GRADIENT = "masked_weights", "mask_gradient"
_SCORES = ("value", "abs", "abs_saliency")
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
    segments: Sequence[int] | str | None = None,  # (S + 1) offsets, or "tensors" for a list without layout
    layout: Blocks | Sequence[Blocks] | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | Sequence[Tensor] | None = None,  # the shape of the result
    backend: str | None = None,
) -> Tensor | list[Tensor]:  # (W,) or (n, W); for a list, each tensor's shape, with n in front
    """θ ⊙ mask, row by row; where a mask removes a weight the result is exactly 0, whatever the weight was.

    Differentiable (not with ``out``) in ``weights``: the masked gradient, summed over rows; and in a float ``mask``:
    for factors the derivative, for particle values with a cut the straight-through one, both
    :func:`mask_gradient`.

    Args:
        weights: the dense weights, flat or as the tensors of a model; their coordinates follow one another.
        mask: bool, 1/True = keep. uint8 or int32: packed bits, as of :func:`pack_mask`. Float without ``cut``:
            factors. Float with ``cut``: particle values, of which the cut says which are kept; no mask is
            written then.
        cut: of :func:`topk_threshold` for the same values, score, saliency and segments. A NaN score is not kept.
        score, saliency: ``"value"``, ``"abs"`` or ``"abs_saliency"``, as in :func:`topk_threshold`; ``None`` for
            ``"value"``.
        segments: those of the cut.
        layout: structured: which weights each coordinate governs, as consecutive :class:`Blocks`, each within
            one tensor. ``None``: one coordinate per weight.
        dtype: of the result; ``None`` for that of ``weights``. Not together with ``out``.
        out: buffers to write into (any float dtype and row stride); returned.
        backend: ``None`` for the fastest available.

    Products of factors are formed in fp32 (fp64 where an input is), rounded once, then rounded to ``dtype``.

    Raises:
        TypeError: an argument that is no tensor of a fitting dtype, or dtype and out together.
        ValueError: shapes, devices, layout or segments that do not fit, or ``out`` sharing memory with an input.
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
        done = torch.ops.sfpk.masked_weights(tensors, rows, *ranking, flat, dtype, backend or "")
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

    Products in the result's dtype, sums in fp64. Differentiable in both arguments. (For single weights
    ``transition_(weights=θ)`` forms the same product without writing it.)

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
    result: Tensor = torch.ops.sfpk.mask_gradient(tensors, rows, flat, backend or "")
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
    check.is_one_of(_OP, "score", score, _SCORES)
    borders = segment_borders(_OP, segments, tensors or None, d) or [0, d]
    for name, tensor, dtypes in (
        ("cut.threshold", cut[0], check.FLOATS),
        ("cut.tie_end", cut[1], (torch.int64,)),
    ):
        check.is_tensor(_OP, name, tensor, dtypes)
        check.has_shape(_OP, name, tensor, (rows.shape[0], len(borders) - 1))
        check.same_device(_OP, name, tensor, mask.device)
    if (saliency is None) == (score == "abs_saliency"):
        wanted = "values to multiply with" if saliency is None else "None"
        raise ValueError(f"{_OP}: saliency: wanted {wanted} with score={score!r}, got {saliency!r:.80}")
    if saliency is not None:
        check.is_tensor(_OP, "saliency", saliency)
        check.has_shape(_OP, "saliency", saliency, (d,))
        check.same_device(_OP, "saliency", saliency, mask.device)
    return cut[0], cut[1], score, saliency, borders


_RANKING = "Tensor? threshold, Tensor? tie_end, str score, Tensor? saliency, int[] segments, int[] layout"
torch.library.define(
    "sfpk::masked_weights",
    f"(Tensor[] weights, Tensor mask, {_RANKING}, ScalarType dtype, str backend) -> Tensor[]",
)
torch.library.define(
    "sfpk::masked_weights_out",
    f"(Tensor[] weights, Tensor mask, {_RANKING}, Tensor(a!)[] out, str backend) -> ()",
)
torch.library.define(
    "sfpk::mask_gradient", "(Tensor[] weights, Tensor[] weight_grads, int[] layout, str backend) -> Tensor"
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


def _masked_weights(weights: list[Tensor], mask: Tensor, *arguments: Any) -> list[Tensor]:
    *ranking, dtype, backend = arguments
    outs = [torch.empty((mask.shape[0], t.numel()), dtype=dtype, device=t.device) for t in weights]
    _run(weights, mask, tuple(ranking), outs, backend)
    return outs


def _masked_weights_out(weights: list[Tensor], mask: Tensor, *arguments: Any) -> None:
    *ranking, outs, backend = arguments
    names = [*((f"weights[{i}]" if len(weights) > 1 else "weights", t) for i, t in enumerate(weights)), ("mask", mask)]
    for out in outs:
        for name, tensor in names:
            if check.share_memory(out, tensor):
                raise ValueError(f"{_OP}: out: wanted memory of its own, got memory shared with {name}")
    rows = [_as_rows(out, mask.shape[0], weight.numel()) for out, weight in zip(outs, weights, strict=True)]
    _run(weights, mask, tuple(ranking), rows, backend)
    for out, row in zip(outs, rows, strict=True):
        if row.data_ptr() != out.data_ptr():
            out.copy_(row.view(out.shape))


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
    flat, rows = [t.flatten().contiguous() for t in weights], [g.reshape(g.shape[0], -1) for g in weight_grads]
    run([p.of(flat[p.tensor]) for p in pieces], [p.of(rows[p.tensor]) for p in pieces], pieces, out)
    return out


def _gradient_buffer(weights: list[Tensor], weight_grads: list[Tensor], layout: list[int]) -> Tensor:
    dtypes = {t.dtype for t in (*weights, *weight_grads)}
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    d = _layout.count(layout, [t.numel() for t in weights])
    return torch.empty((weight_grads[0].shape[0], d), dtype=dtype, device=weights[0].device)


torch.library.impl("sfpk::masked_weights", ("cpu", "cuda"))(_masked_weights)
torch.library.impl("sfpk::masked_weights_out", ("cpu", "cuda"))(_masked_weights_out)
torch.library.impl("sfpk::mask_gradient", ("cpu", "cuda"))(_mask_gradient)


@torch.library.register_fake("sfpk::masked_weights")
def _masked_weights_fake(weights: list[Tensor], mask: Tensor, *arguments: Any) -> list[Tensor]:
    dtype = arguments[-2]
    return [torch.empty((mask.shape[0], t.numel()), dtype=dtype, device=t.device) for t in weights]


@torch.library.register_fake("sfpk::masked_weights_out")
def _masked_weights_out_fake(weights: list[Tensor], mask: Tensor, *arguments: Any) -> None:
    return None


@torch.library.register_fake("sfpk::mask_gradient")
def _mask_gradient_fake(weights: list[Tensor], weight_grads: list[Tensor], layout: list[int], backend: str) -> Tensor:
    return _gradient_buffer(weights, weight_grads, layout)


def _none_for(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """No gradients, as autograd expects them: torch takes an empty list of numbers for one of tensors."""
    return tuple([] if isinstance(value, list) and not value else None for value in inputs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    weights, mask, threshold, tie_end, ctx.score, saliency, ctx.segments, ctx.layout, _, _ = inputs
    ctx.no_gradients = _none_for(inputs[2:])
    ctx.save_for_backward(mask, threshold, tie_end, saliency, *weights)


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    mask, threshold, tie_end, saliency, *weights = ctx.saved_tensors
    grads = [g if g is not None else w.new_zeros(mask.shape[0], w.numel()) for g, w in zip(grads, weights, strict=True)]
    by_weights: list[Tensor | None] = [None] * len(weights)
    by_mask = None
    if any(w.requires_grad for w in weights):
        # Kept gradients, a row at a time: the row's gradient takes the place of the weights.
        rows = []
        for i in range(mask.shape[0]):
            cut = (t if t is None else t[i : i + 1] for t in (threshold, tie_end))
            ranking = (*cut, ctx.score, saliency, ctx.segments, ctx.layout)
            row = [g[i] for g in grads]
            rows.append(torch.ops.sfpk.masked_weights(row, mask[i : i + 1].detach(), *ranking, grads[0].dtype, ""))
        by_weights = [
            (torch.cat(parts).sum(dim=0) if parts else w.new_zeros(w.numel())).view(w.shape).to(w.dtype)
            for w, parts in zip(weights, zip(*rows, strict=True) if rows else [()] * len(weights), strict=True)
        ]
    if mask.requires_grad:
        shaped = [g.view(mask.shape[0], *w.shape) for g, w in zip(grads, weights, strict=True)]
        by_mask = torch.ops.sfpk.mask_gradient(weights, shaped, ctx.layout, "").to(mask.dtype)
    return by_weights, by_mask, *ctx.no_gradients


def _gradient_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weights, weight_grads, ctx.layout, _ = inputs
    ctx.count, ctx.no_gradients = len(weights), _none_for(inputs[2:])
    ctx.save_for_backward(*weights, *weight_grads)


def _gradient_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    weights, weight_grads = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
    sizes = [t.numel() for t in weights]
    pieces = _layout.pieces(ctx.layout, sizes)
    assert pieces is not None
    by_weights, by_grads = [], []
    for t, (weight, weight_grad) in enumerate(zip(weights, weight_grads, strict=True)):
        parts = [reference.spread(grad[:, p.coordinates], p) for p in pieces if p.tensor == t]
        spread = torch.cat(parts, dim=1).view(weight_grad.shape)
        by_weights.append((spread * weight_grad).sum(dim=0).to(weight.dtype))
        by_grads.append((spread * weight).to(weight_grad.dtype))
    return by_weights, by_grads, *ctx.no_gradients


torch.library.register_autograd("sfpk::masked_weights", _backward, setup_context=_setup_context)
torch.library.register_autograd("sfpk::mask_gradient", _gradient_backward, setup_context=_gradient_setup)

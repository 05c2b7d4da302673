"""``masked_weights``: θ ⊙ mask for one mask or one per particle; ``mask_gradient``: its derivative by the mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from .. import _checks as check
from .. import _transforms as transforms
from ..layout import Blocks, normalize
from ..selection import Cut
from ._arguments import as_tensors, check_mask, cut_of
from ._derivatives import BY_MASK, MASKED
from ._ops import BACKENDS, GRADIENT, PRODUCT
from .prepared import PreparedMasking

__all__ = ["BACKENDS", "Blocks", "PreparedMasking", "mask_gradient", "masked_weights"]


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
    coordinates: int | None = ...,
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
    coordinates: int | None = ...,
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
    coordinates: int | None = None,  # d
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
        score, saliency: ``"value"``, ``"abs"``, ``"abs_saliency"`` or ``"value_saliency"``, as in
            :func:`topk_threshold`; ``None`` for ``"value"``.
        segments: those of the cut: offsets over all coordinates; ``"tensors"``: each tensor of a list is one, which a
            layout has no use for.
        layout: structured: which weights each coordinate governs, as :class:`Blocks` that cover the weights one
            after the other, each within one tensor; those with ``first`` may have coordinates in common. ``None``: one
            coordinate per weight.
        coordinates: d, where more of them are there than the layout reaches; ``None`` for as many as it does.
        dtype: of the result; ``None`` for that of ``weights``. Not together with ``out``.
        out: buffers to write into (any float dtype and row stride); returned.
        backend: ``None`` for the fastest available.

    Products of factors are formed in fp32 (fp64 where an input is), rounded once, then rounded to ``dtype``.

    Raises:
        TypeError: an argument that is no tensor of a fitting dtype, or dtype and out together.
        ValueError: shapes, devices, layout or segments that do not fit, ``out`` sharing memory with an input or with
            itself, or inputs beside it that record a gradient.
    """
    tensors = as_tensors(PRODUCT, weights)
    device, is_list = tensors[0].device, not isinstance(weights, Tensor)
    flat, d = normalize(PRODUCT, layout, [t.numel() for t in tensors], coordinates)
    check_mask(PRODUCT, mask, d, device)
    rows = mask if mask.dim() == 2 else mask[None]
    ranking = cut_of(PRODUCT, mask, rows, cut, score, saliency, segments, d, tensors if is_list and not flat else [])
    shapes = [tuple(t.shape) if mask.dim() == 1 else (mask.shape[0], *t.shape) for t in tensors]
    if out is None:
        dtype = tensors[0].dtype if dtype is None else dtype
        if dtype not in check.FLOATS:
            raise TypeError(f"{PRODUCT}: dtype: wanted a float dtype, got {dtype}")
        done = MASKED(tensors, rows, *ranking, flat, dtype, backend or "", d)
        results = [t.view(shape) for t, shape in zip(done, shapes, strict=True)]
        return results if is_list else results[0]
    if dtype is not None:
        raise TypeError(f"{PRODUCT}: dtype: wanted None together with out, got {dtype}")
    buffers = [out] if isinstance(out, Tensor) else list(out)
    if is_list == isinstance(out, Tensor) or len(buffers) != len(tensors):
        raise TypeError(
            f"{PRODUCT}: out: wanted {len(tensors) if is_list else 'one'} tensor(s) like weights, got {out!r:.80}"
        )
    for i, (buffer, shape) in enumerate(zip(buffers, shapes, strict=True)):
        name = f"out[{i}]" if is_list else "out"
        check.is_tensor(PRODUCT, name, buffer)
        check.has_shape(PRODUCT, name, buffer, shape)
        check.same_device(PRODUCT, name, buffer, device)
    named = [*((f"weights[{i}]" if is_list else "weights", t) for i, t in enumerate(tensors)), ("mask", mask)]
    transforms.refuse_derivatives(PRODUCT, "a result written into out has no derivative", named)
    torch.ops.sfpk.masked_weights_out(tensors, rows, *ranking, flat, buffers, backend or "", d)
    return out if isinstance(out, Tensor) else buffers


def mask_gradient(
    weights: Tensor | Sequence[Tensor],  # (W,), or a list of tensors
    weight_grads: Tensor | Sequence[Tensor],  # ∂L/∂W_i: the shapes of weights, or with n in front
    *,
    layout: Blocks | Sequence[Blocks] | None = None,
    coordinates: int | None = None,  # d
    backend: str | None = None,
) -> Tensor:  # (d,) or (n, d) fp32, fp64 where an input is
    """The gradient by the mask, straight through the polarizer: Σ_{w in e} θ_w · ∂L/∂W_w for every coordinate e.

    The sum is over all weights that e governs, in whichever tensors and :class:`Blocks` they are; 0 where it governs
    none. Products in the result's dtype, sums in fp64, added in the order of the layout. Differentiable in both
    arguments, like :func:`masked_weights`. (For single weights ``transition_(weights=θ)`` forms the same product
    without writing it.)

    Source: method step 2; the chain rule of W = P ⊙ θ with ∂P/∂m = 1.

    Args:
        weights: the dense weights, flat or as the tensors of a model.
        weight_grads: the gradients by the masked weights, one per row of the mask where n is in front.
        layout, coordinates: as in :func:`masked_weights`.
        backend: ``None`` for the fastest available.

    Raises:
        TypeError: an argument that is no float tensor, or a list beside a tensor.
        ValueError: shapes, devices, a layout or a number of coordinates that do not fit.
    """
    tensors = as_tensors(GRADIENT, weights)
    is_list = not isinstance(weights, Tensor)
    if is_list == isinstance(weight_grads, Tensor):
        wanted = "a list of tensors" if is_list else "a tensor"
        raise TypeError(f"{GRADIENT}: weight_grads: wanted {wanted}, got {type(weight_grads).__name__}")
    grads: list[Any] = list(weight_grads) if is_list else [weight_grads]
    if len(grads) != len(tensors):
        raise ValueError(f"{GRADIENT}: weight_grads: wanted {len(tensors)} tensors, got {len(grads)}")
    batched = isinstance(grads[0], Tensor) and grads[0].dim() == tensors[0].dim() + 1
    for i, (weight, grad) in enumerate(zip(tensors, grads, strict=True)):
        name = f"weight_grads[{i}]" if is_list else "weight_grads"
        check.is_tensor(GRADIENT, name, grad)
        check.has_shape(GRADIENT, name, grad, (*grads[0].shape[:1], *weight.shape) if batched else tuple(weight.shape))
        check.same_device(GRADIENT, name, grad, weight.device)
    flat, d = normalize(GRADIENT, layout, [t.numel() for t in tensors], coordinates)
    rows = [g if batched else g[None] for g in grads]
    (result,) = BY_MASK(tensors, rows, flat, backend or "", d)
    return result if batched else result[0]

"""``masked_weights``: θ ⊙ mask for one mask or one per particle."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._dispatch import Backend, choose
from .. import _checks as check
from . import reference

_OP = "masked_weights"
_BACKENDS = {"reference": Backend(reference.masked_weights_)}


def masked_weights(
    weights: Tensor,  # (d,) float: θ
    mask: Tensor,  # (d,) or (n, d): bool, or float factors
    *,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,  # the shape of mask
    backend: str | None = None,
) -> Tensor:  # the shape of mask
    """θ ⊙ mask, row by row; where a bool mask is False the result is exactly 0.

    Differentiable in ``weights`` (the gradient is the masked gradient, summed over rows), not in the mask and
    not with ``out``.

    Args:
        weights: the flat dense weights.
        mask: bool, 1/True = keep; a float mask is multiplied as it is (a soft mask).
        dtype: of the result; ``None`` for that of ``weights``. Not together with ``out``.
        out: buffer to write into (any float dtype and row stride); returned.
        backend: ``None`` for the fastest available.

    Raises:
        TypeError: an argument that is no tensor of a fitting dtype, or dtype and out together.
        ValueError: shapes or devices that do not fit, or ``out`` sharing memory with an input.
    """
    check.is_tensor(_OP, "weights", weights)
    if weights.dim() != 1:
        raise ValueError(f"{_OP}: weights: wanted shape (d,), got {tuple(weights.shape)}")
    check.is_tensor(_OP, "mask", mask, (torch.bool, *check.FLOATS))
    if mask.dim() not in (1, 2) or mask.shape[-1] != weights.shape[0]:
        d = weights.shape[0]
        raise ValueError(f"{_OP}: mask: wanted shape ({d},) or (n, {d}), got {tuple(mask.shape)}")
    check.same_device(_OP, "mask", mask, weights.device)
    if out is None:
        dtype = weights.dtype if dtype is None else dtype
        if dtype not in check.FLOATS:
            raise TypeError(f"{_OP}: dtype: wanted a float dtype, got {dtype}")
        return torch.ops.sfpk.masked_weights(weights, mask, dtype, backend or "")
    if dtype is not None:
        raise TypeError(f"{_OP}: dtype: wanted None together with out, got {dtype}")
    check.is_tensor(_OP, "out", out)
    check.has_shape(_OP, "out", out, tuple(mask.shape))
    check.same_device(_OP, "out", out, weights.device)
    torch.ops.sfpk.masked_weights_out(weights, mask, out, backend or "")
    return out


torch.library.define("sfpk::masked_weights", "(Tensor weights, Tensor mask, ScalarType dtype, str backend) -> Tensor")
torch.library.define("sfpk::masked_weights_out", "(Tensor weights, Tensor mask, Tensor(a!) out, str backend) -> ()")


@torch.library.impl("sfpk::masked_weights", ("cpu", "cuda"))
def _masked_weights(weights: Tensor, mask: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    out = torch.empty(mask.shape, dtype=dtype, device=weights.device)
    choose(_OP, backend, _BACKENDS, weights)(weights, mask, out)
    return out


@torch.library.impl("sfpk::masked_weights_out", ("cpu", "cuda"))
def _masked_weights_out(weights: Tensor, mask: Tensor, out: Tensor, backend: str) -> None:
    for name, tensor in (("weights", weights), ("mask", mask)):
        if check.share_memory(out, tensor):
            raise ValueError(f"{_OP}: out: wanted memory of its own, got memory shared with {name}")
    choose(_OP, backend, _BACKENDS, weights)(weights, mask, out)


@torch.library.register_fake("sfpk::masked_weights")
def _masked_weights_fake(weights: Tensor, mask: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    return torch.empty(mask.shape, dtype=dtype, device=weights.device)


@torch.library.register_fake("sfpk::masked_weights_out")
def _masked_weights_out_fake(weights: Tensor, mask: Tensor, out: Tensor, backend: str) -> None:
    return None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weights, mask, _, _ = inputs
    ctx.save_for_backward(mask)
    ctx.dtype = weights.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
    (mask,) = ctx.saved_tensors
    kept = grad * mask if mask.is_floating_point() else grad.masked_fill(~mask, 0)
    total = kept if kept.dim() == 1 else kept.sum(dim=0)
    return total.to(ctx.dtype), None, None, None


torch.library.register_autograd("sfpk::masked_weights", _backward, setup_context=_setup_context)

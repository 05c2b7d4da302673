"""The masked model: keep values multiply what consumers read, so that removed coordinates have a gradient.

A mask on the producers would cut a removed coordinate off from the loss: its activation is 0 or a constant of the norm
behind it, and its gradient with it. On the consumers' input columns the activation is there, and ∂L/∂keep with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..coordinates.flat import unwrapped
from .axes import Norm, Structure, kept


def gated_weights(
    structure: Structure,
    tensors: Mapping[str, Tensor],
    keep: Tensor,  # (C,) bool or floating point
) -> dict[str, Tensor]:
    """The consumers' weights, every input column times the value of its coordinate; differentiable in both.

    A dict for ``torch.func.functional_call``; producers, biases and norms stay as they are.
    """
    found: dict[str, Tensor] = {}
    for entry in structure.gates:
        weight = tensors[entry.tensor]
        index = entry.index.to(weight.device)
        values = keep.to(weight.device, weight.dtype)[index.clamp_min(0)]
        factors = torch.where(index >= 0, values, 1)
        found[entry.tensor] = weight * factors.view(_along(entry.dim, weight.dim()))
    return found


def gate_gradient(
    structure: Structure,
    tensors: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
) -> Tensor:  # (C,) fp32, or fp64 for fp64 weights
    """∂L/∂keep_c = Σ w · ∂L/∂(gated w) over the gate entries of coordinate c, from the gradients of the gated weights.

    Sums are accumulated in fp64.
    """
    total: Tensor | None = None
    wide = False
    for entry in structure.gates:
        weight, gradient = tensors[entry.tensor].detach(), gradients[entry.tensor].detach()
        others = [dim for dim in range(weight.dim()) if dim != entry.dim]
        product = weight.double() * gradient.double()
        sums = product.sum(others) if others else product
        if total is None:
            total = torch.zeros(structure.size, dtype=torch.float64, device=weight.device)
        wide |= weight.dtype == torch.float64
        index = entry.index.to(weight.device)
        total.index_add_(0, index[index >= 0], sums[index >= 0])
    assert total is not None, "a structure has gates"
    return total if wide else total.float()


@contextmanager
def kept_statistics(
    model: nn.Module,
    structure: Structure,
    keep: Tensor,  # (C,) bool or floating point, 0: removed
) -> Iterator[None]:
    """LayerNorms and RMSNorms over a pruned width use the statistics of the kept channels alone, as if shrunk."""
    model = unwrapped(model)
    changed: list[tuple[nn.Module, Any]] = []
    keep = keep.detach().cpu() != 0
    try:
        for norm in structure.norms:
            module = model.get_submodule(norm.module)
            changed.append((module, module.__dict__.get("forward")))
            module.__dict__["forward"] = partial(_norm, module, _present(norm, keep))
        yield
    finally:
        for module, forward in reversed(changed):
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward


def gated_call(
    model: nn.Module,
    structure: Structure,
    keep: Tensor,  # (C,) bool or floating point
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """The output of the masked model; buffers may change as they do in any call in train mode."""
    model = unwrapped(model)
    weights = gated_weights(structure, dict(model.named_parameters(remove_duplicate=False)), keep)
    with kept_statistics(model, structure, keep):
        return torch.func.functional_call(model, weights, tuple(args), dict(kwargs or {}), tie_weights=False)


def _along(dim: int, dims: int) -> list[int]:
    return [-1 if i == dim else 1 for i in range(dims)]


def _present(norm: Norm, keep: Tensor) -> Tensor:
    return kept(norm.index, keep)


def _norm(module: nn.Module, present: Tensor, x: Tensor) -> Tensor:
    """LayerNorm or RMSNorm (torch's and those that name their epsilon alike), over the positions that are present."""
    wide = x if x.dtype == torch.float64 else x.float()
    mask = present.to(x.device, wide.dtype)
    count = mask.sum()
    if isinstance(module, nn.LayerNorm):
        mean = (wide * mask).sum(-1, keepdim=True) / count
        wide = wide - mean
        eps = module.eps
    else:
        named = getattr(module, "eps", getattr(module, "variance_epsilon", None))
        eps = torch.finfo(x.dtype).eps if named is None else named
    variance = (wide.square() * mask).sum(-1, keepdim=True) / count
    y = (wide * torch.rsqrt(variance + eps)).to(x.dtype)
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias

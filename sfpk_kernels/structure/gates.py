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
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..coordinates.flat import unwrapped
from .axes import Structure, kept
from .sums import coordinate_sums


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
    products = {
        entry.tensor: _wide(tensors[entry.tensor]).mul(_wide(gradients[entry.tensor])) for entry in structure.gates
    }
    found = coordinate_sums(structure, products, ("gate",))
    wide = any(tensors[name].dtype == torch.float64 for name in products)
    return found if wide else found.float()


def _wide(tensor: Tensor) -> Tensor:
    """fp32 at least."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


@contextmanager
def kept_statistics(
    model: nn.Module,
    structure: Structure,
    keep: Tensor,  # (C,) bool or floating point, 0: removed
) -> Iterator[None]:
    """LayerNorms and RMSNorms over a pruned width use the statistics of the kept channels alone, as if shrunk."""
    model = unwrapped(model)
    changed: list[tuple[nn.Module, Any]] = []
    try:
        if structure.norms:
            keep = keep.detach() != 0
        for norm, index in zip(structure.norms, structure.norm_indices(keep.device), strict=True):
            module = model.get_submodule(norm.module)
            changed.append((module, module.__dict__.get("forward")))
            module.__dict__["forward"] = _forward(module, kept(index, keep))
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


class KeptForward(partial[Tensor]):
    """The forward of a norm whose statistics are those of the positions that are present; copied with its module."""


def _forward(module: nn.Module, present: Tensor) -> KeptForward:
    if isinstance(module, nn.LayerNorm | nn.RMSNorm) and type(module).forward not in _FORWARDS:
        return KeptForward(_within, module.forward, present)  # it moves channels to the end first, for one
    return KeptForward(_layer_norm_of if isinstance(module, nn.LayerNorm) else _rms_norm_of, module, present)


def _layer_norm_of(module: Any, present: Tensor, x: Tensor) -> Tensor:
    return _layer_norm(present, x, module.normalized_shape, module.weight, module.bias, module.eps)


def _rms_norm_of(module: Any, present: Tensor, x: Tensor) -> Tensor:
    eps = getattr(module, "eps", getattr(module, "variance_epsilon", None))
    return _rms_norm(present, x, x.shape[-1:], module._parameters["weight"], eps)


_FORWARDS = (nn.LayerNorm.forward, nn.RMSNorm.forward)


def _within(forward: Any, present: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    with _Norms(present):
        return forward(*args, **kwargs)


class _Norms(TorchFunctionMode):
    """Within it torch's norms use the statistics of the positions that are present."""

    def __init__(self, present: Tensor):
        super().__init__()
        self._present = present

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        ours = _OURS.get(func)
        return func(*args, **(kwargs or {})) if ours is None else ours(self._present, *args, **(kwargs or {}))


def _layer_norm(
    present: Tensor,  # (width,) bool
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``torch.nn.functional.layer_norm`` over the last dim, with the statistics of what is present."""
    wide = input if input.dtype == torch.float64 else input.float()
    mask = present.to(input.device, wide.dtype)
    wide = wide - (wide * mask).sum(-1, keepdim=True) / mask.sum()
    variance = (wide.square() * mask).sum(-1, keepdim=True) / mask.sum()
    autocast = torch.is_autocast_enabled(input.device.type)  # its layer_norm is in fp32
    y = (wide * torch.rsqrt(variance + eps)).to(wide.dtype if autocast else input.dtype)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _rms_norm(
    present: Tensor,  # (width,) bool
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """``torch.nn.functional.rms_norm`` over the last dim, with the statistics of what is present."""
    wide = input if input.dtype == torch.float64 else input.float()
    mask = present.to(input.device, wide.dtype)
    variance = (wide.square() * mask).sum(-1, keepdim=True) / mask.sum()
    y = (wide * torch.rsqrt(variance + (torch.finfo(input.dtype).eps if eps is None else eps))).to(input.dtype)
    return y if weight is None else y * weight


_OURS: dict[Any, Any] = {F.layer_norm: _layer_norm, F.rms_norm: _rms_norm}

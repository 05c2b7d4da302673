"""The fused transition in C++ (csrc/cpu/transition.cpp): two passes over the particles, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _extension
from .reference import TransitionStats

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def why_not(masks: Tensor) -> str | None:
    """Why the kernel cannot run on these particles."""
    if masks.device.type != "cpu":
        return f"it runs on the CPU, the particles are on {masks.device}"
    if masks.dtype not in _FLOATS:
        return f"it takes fp32, fp16 and bf16 particles, these are {str(masks.dtype).removeprefix('torch.')}"
    if masks.shape[1] > 1 and masks.stride(1) != 1:
        return f"it takes rows without gaps, these have a column stride of {masks.stride(1)}"
    if masks.shape[0] > 1 and abs(masks.stride(0)) < masks.shape[1]:
        return f"it takes rows that do not overlap, these have a row stride of {masks.stride(0)}"
    return _extension.unavailable()


def transition_(
    masks: Tensor,  # (n, d) fp32, fp16 or bf16, moved in place
    grads: Tensor,  # (n, d), or (1, d) with only
    weights: Tensor | None,
    saliency: Tensor | None,
    sizes: Tensor | None,
    residual: Tensor | None,
    state: TransitionStats | None,
    *,
    step: float,
    radius: float,
    repulsion: float,
    kernel: str,
    density: str,
    target_density: float | None,
    consensus: float,
    eps: float,
    key: int,
    skip: bool,
    only: int,
) -> TransitionStats:
    """As :func:`.reference.transition_`."""
    if grads.dtype not in _FLOATS:
        grads = grads.float()
    if grads.shape[1] > 1 and grads.stride(1) != 1:
        grads = grads.contiguous()
    weights, saliency, sizes = (t if t is None else t.float().contiguous() for t in (weights, saliency, sizes))
    weighted = kernel == "weighted_rbf"
    if residual is not None and residual.shape[1] > 1 and residual.stride(1) != 1:
        raise ValueError("transition_: residual: wanted rows without gaps for backend 'cpp', got a column stride")
    # fmt: off
    stats = torch.ops.sfpk_cpp.transition_(
        masks, grads, weights, saliency if weighted else None, sizes, residual,
        list(state) if state is not None else [], step, radius, repulsion, weighted, density == "l2_squared",
        target_density, consensus, eps, key, skip, only,
    )
    # fmt: on
    return TransitionStats(*stats)

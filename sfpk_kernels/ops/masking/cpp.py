"""Masked weights in C++ (csrc/cpu/masked_weights.cpp): one read of mask and weights, one write, no temporary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _extension
from ...utils.tensors import gapless
from ..codes import score_code
from ..layout import Piece, numbers
from ._arguments import Mask


def why_not(tensor: Tensor) -> str | None:
    """Why the kernels cannot run on weights, a mask or an output."""
    if tensor.device.type != "cpu":
        return f"it runs on the CPU, the tensor is on {tensor.device}"
    if tensor.dtype == torch.float64:
        return "it takes fp32, bf16 or fp16, this is float64"
    return _extension.unavailable()


def masked_weights_(weights: Sequence[Tensor], mask: Mask, pieces: Sequence[Piece], outs: Sequence[Tensor]) -> None:
    """As :func:`.reference.masked_weights_`."""
    values = gapless(mask.values)
    saliency = None if mask.saliency is None else mask.saliency.float().contiguous()
    threshold = None if mask.threshold is None else mask.threshold.float().contiguous()
    tie_end = None if mask.tie_end is None else mask.tie_end.contiguous()
    targets = [gapless(out) for out in outs]
    torch.ops.sfpk_cpp.masked_weights_(
        list(weights), values, mask.kind.value, score_code(mask.score), saliency, threshold, tie_end,
        torch.tensor(mask.segments, dtype=torch.int64, device=values.device), numbers(pieces), targets,
    )  # fmt: skip
    for out, target in zip(outs, targets, strict=True):
        if target is not out:
            out.copy_(target)


def mask_gradient_(weights: Sequence[Tensor], grads: Sequence[Tensor], pieces: Sequence[Piece], out: Tensor) -> None:
    """As :func:`.reference.mask_gradient_`."""
    torch.ops.sfpk_cpp.mask_gradient_(list(weights), [gapless(g) for g in grads], numbers(pieces), out)

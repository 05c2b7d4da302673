"""Masked weights in CUDA (csrc/cuda/masked_weights_kernels.cu)."""

from __future__ import annotations

import functools
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
    if tensor.device.type != "cuda":
        return f"it runs on CUDA devices, the tensor is on {tensor.device}"
    if tensor.dtype == torch.float64:
        return "it takes fp32, bf16 or fp16, this is float64"
    return _extension.without_cuda()


def masked_weights_(weights: Sequence[Tensor], mask: Mask, pieces: Sequence[Piece], outs: Sequence[Tensor]) -> None:
    """As :func:`.reference.masked_weights_`."""
    values = gapless(mask.values)
    saliency = None if mask.saliency is None else mask.saliency.float().contiguous()
    threshold = None if mask.threshold is None else mask.threshold.float().contiguous()
    tie_end = None if mask.tie_end is None else mask.tie_end.contiguous()
    targets = [gapless(out) for out in outs]
    borders = _borders(tuple(mask.segments), values.device)
    torch.ops.sfpk_cpp.masked_weights_device_(
        list(weights), values, mask.kind.value, score_code(mask.score), saliency, threshold, tie_end, borders,
        numbers(pieces), mask.d, targets,
    )  # fmt: skip
    for out, target in zip(outs, targets, strict=True):
        if target is not out:
            out.copy_(target)


def mask_gradient_(weights: Sequence[Tensor], grads: Sequence[Tensor], pieces: Sequence[Piece], out: Tensor) -> None:
    """As :func:`.reference.mask_gradient_`."""
    torch.ops.sfpk_cpp.mask_gradient_device_(list(weights), [gapless(g) for g in grads], numbers(pieces), out)


@functools.lru_cache(maxsize=256)
def _borders(segments: tuple[int, ...], device: torch.device) -> Tensor:  # (S + 1,) int64
    """The segments' borders on the device, copied there once: each copy would wait for it, and none can be captured."""
    return torch.tensor(segments, dtype=torch.int64, device=device)

"""What the masking ops may be given, checked; and the mask as their backends take it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from ..codes import ENTRY_SCORES, MaskKind
from ..packing import BITS, units
from ..segments import segment_borders


@dataclass(frozen=True)
class Mask:
    """What is kept: one of bools, packed bits, factors, or values with the cut they are compared with."""

    values: Tensor  # (n, d), packed (n, bytes or words)
    d: int
    threshold: Tensor | None  # (n, S)
    tie_end: Tensor | None  # (n, S)
    score: str
    saliency: Tensor | None  # (d,)
    segments: list[int]  # (S + 1)

    @property
    def kind(self) -> MaskKind:
        """What the kernels are told it is."""
        if self.threshold is not None:
            return MaskKind.CUT
        if self.values.dtype == torch.bool:
            return MaskKind.BOOL
        return MaskKind.FACTORS if self.values.is_floating_point() else MaskKind.PACKED

    @property
    def multiplies(self) -> bool:
        """Whether it is made of factors."""
        return self.kind == MaskKind.FACTORS


def check_mask(op: str, mask: Any, d: int, device: torch.device) -> Tensor:
    """``mask`` is bool, packed or float, for d coordinates."""
    check.is_tensor(op, "mask", mask, (torch.bool, *check.FLOATS, *BITS))
    wanted = units(mask.dtype, d)
    if mask.dim() not in (1, 2) or mask.shape[-1] != wanted:
        raise ValueError(f"{op}: mask: wanted shape ({wanted},) or (n, {wanted}), got {tuple(mask.shape)}")
    check.same_device(op, "mask", mask, device)
    return mask


def as_tensors(op: str, weights: Any) -> list[Tensor]:
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


def cut_of(
    op: str,
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
                raise ValueError(f"{op}: {name}: wanted None without a cut, got {value!r:.80}")
        return None, None, "value", None, []
    if not isinstance(cut, tuple) or len(cut) != 2:
        raise TypeError(f"{op}: cut: wanted a Cut(threshold, tie_end), got {cut!r:.80}")
    if not mask.is_floating_point():
        raise TypeError(f"{op}: mask: wanted float particle values beside a cut, got {mask.dtype}")
    score = "value" if score is None else score
    check.is_one_of(op, "score", score, ENTRY_SCORES)
    borders = segment_borders(op, segments, tensors or None, d, offsets=True)
    for name, tensor, dtypes in (
        ("cut.threshold", cut[0], check.FLOATS),
        ("cut.tie_end", cut[1], (torch.int64,)),
    ):
        check.is_tensor(op, name, tensor, dtypes)
        check.has_shape(op, name, tensor, (rows.shape[0], max(len(borders) - 1, 1)))
        check.same_device(op, name, tensor, mask.device)
    if (saliency is None) == score.endswith("saliency"):
        wanted = "values to multiply with" if saliency is None else "None"
        raise ValueError(f"{op}: saliency: wanted {wanted} with score={score!r}, got {saliency!r:.80}")
    if saliency is not None:
        check.is_tensor(op, "saliency", saliency)
        check.has_shape(op, "saliency", saliency, (d,))
        check.same_device(op, "saliency", saliency, mask.device)
    return cut[0], cut[1], score, saliency, borders

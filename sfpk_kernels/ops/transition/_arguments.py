"""Checks of what the fused transition and its stages have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .. import _transforms as transforms
from .spec import Columns, TransitionSpec, TransitionStats, check_integer


def check_particles(
    op: str,
    masks: Tensor,  # (n, d)
    residual: Tensor | None,  # (n, d)
    *,
    least: int = 1,  # columns
) -> None:
    """Particles, with a residual where they are bf16 and only there."""
    check.is_tensor(op, "masks", masks)
    if masks.dim() != 2 or masks.shape[0] < 1 or masks.shape[1] < least:
        raise ValueError(f"{op}: masks: wanted shape (n ≥ 1, d ≥ {least}), got {tuple(masks.shape)}")
    if (masks.dtype == torch.bfloat16) != (residual is not None):
        wanted = "a bf16 tensor with bf16 masks" if residual is None else f"None with {masks.dtype} masks"
        raise ValueError(f"{op}: residual: wanted {wanted}, got {'None' if residual is None else 'a tensor'}")
    if residual is not None:
        check.is_tensor(op, "residual", residual, (torch.bfloat16,))
        check.has_shape(op, "residual", residual, tuple(masks.shape))
        check.same_device(op, "residual", residual, masks.device)


def check_row(op: str, name: str, row: Any, n: int) -> None:
    """The number of a particle."""
    check_integer(op, name, row, "an integer or None")
    if not 0 <= row < n:
        raise ValueError(f"{op}: {name}: wanted 0 … {n - 1}, got {row}")


def check_gradients(
    op: str,
    masks: Tensor,  # (n, d)
    grads: Tensor,  # (n, d), or (1, d) where one particle moves
    one: bool,
) -> None:
    """A row of gradients per particle that may move."""
    check.is_tensor(op, "grads", grads)
    check.has_shape(op, "grads", grads, (1 if one else masks.shape[0], masks.shape[1]))
    check.same_device(op, "grads", grads, masks.device)


def check_columns(op: str, masks: Tensor, columns: Columns, kernel: str) -> None:
    """Vectors over the columns of ``masks``, and a saliency where the kernel asks for one."""
    for name, vector in zip(Columns._fields, columns, strict=True):
        if vector is not None:
            check.is_tensor(op, name, vector)
            check.has_shape(op, name, vector, (masks.shape[1],))
            check.same_device(op, name, vector, masks.device)
    if kernel == "weighted_rbf" and columns.saliency is None:
        raise ValueError(f"{op}: saliency: wanted shape ({masks.shape[1]},) with kernel='weighted_rbf', got None")


def check_state(op: str, state: Any, n: int, device: torch.device, wanted: str = "TransitionStats") -> None:
    """The statistics of n particles."""
    if not isinstance(state, TransitionStats):
        raise TypeError(f"{op}: state: wanted {wanted}, got {type(state).__name__}")
    check.has_shape(op, "state", state.sq_distances, (n, n))
    check.same_device(op, "state", state.sq_distances, device)


def refuse_derivatives(op: str, columns: Columns, tensors: Sequence[tuple[str, Tensor | None]]) -> None:
    """A step has none."""
    named = [*tensors, *zip(Columns._fields, columns, strict=True)]
    transforms.refuse_derivatives(op, "a step has no derivative", named)


def check_values(op: str, columns: Columns, spec: TransitionSpec) -> None:
    """What is known of the numbers in the vectors; looked at once per tensor."""
    if columns.sizes is not None:
        check.at_least(op, "sizes", columns.sizes, 0.0, strictly=True)
    if spec.weighted and columns.saliency is not None:
        check.at_least(op, "saliency", columns.saliency, 0.0)


def check_finite(
    cosines: Tensor,  # (n,)
) -> None:
    """Raise a ValueError that names the particles whose gradient was not finite: their cosine is NaN."""
    rows = [i for i, cosine in enumerate(cosines.tolist()) if math.isnan(cosine)]
    if rows:
        raise ValueError(f"transition_: grads: wanted finite gradients, got non-finite ones in particles {rows}")


def check_memory(op: str, masks: Tensor, grads: Tensor, residual: Tensor | None) -> None:
    """What is written has memory of its own."""
    check.owns_memory(op, "masks", masks)
    if residual is not None:
        check.owns_memory(op, "residual", residual)
    if check.share_memory(masks, grads):
        raise ValueError(f"{op}: grads: wanted memory of its own, got memory shared with masks")
    if residual is not None and (check.share_memory(masks, residual) or check.share_memory(grads, residual)):
        raise ValueError(f"{op}: residual: wanted memory of its own, got memory shared with masks or grads")


def new_statistics(like: Tensor, n: Any) -> tuple[Tensor, ...]:
    """Fields of TransitionStats but for the cosines, to be filled."""
    vectors = [like.new_empty(n, dtype=torch.float64) for _ in range(4)]
    return (*vectors, like.new_empty((n, n), dtype=torch.float64))

"""What the selection's GPU backends share: counts on the device, and what they leave to the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from ..codes import MOST_ROWS
from ._problem import Problem, nan_error, plan


def uncovered(problem: Problem) -> str | None:
    """Which part of the problem the GPU kernels do not solve."""
    for name, part in (("sizes", problem.sizes), ("pattern", problem.pattern)):
        if part:
            return f"it does not solve {name}"
    if problem.rows > MOST_ROWS:
        return f"it ranks up to {MOST_ROWS:,} rows, these are {problem.rows:,}"
    return "it solves one segment" if len(problem.segments) > 2 else None


def knows_all(problem: Problem) -> bool:
    """Whether the host need not know any value: nothing is checked then, and nothing waited for."""
    return problem.k.device.type != "cpu" and not problem.constrained


def counts(problem: Problem, excluded: list[Tensor]) -> tuple[Tensor, Tensor]:  # (rows,) each, int64
    """How many candidates to keep, and how many there are; on the device."""
    if knows_all(problem):
        return problem.k, torch.full_like(problem.k, problem.segments[-1])
    device = problem.values[0].device
    wanted, limits = plan(problem, excluded)
    return torch.tensor(wanted, dtype=torch.int64, device=device), limits[2, :, 0].to(device)


def check_nan(
    problem: Problem,
    nan: Tensor,  # (rows, …) bool
) -> None:
    """Raises where a score was NaN; waits for the device."""
    rows: list[bool] = nan.reshape(problem.rows, nan[:1].numel()).any(dim=1).tolist()
    if not any(rows):
        return
    if problem.by_rows:
        raise nan_error(problem, rows.index(True))
    raise nan_error(problem, next(i for i, t in enumerate(problem.values) if bool(torch.isnan(t).any())))


def as_rows(tensor: Tensor) -> Tensor:  # (n, d)
    """Rows may lie apart, entries of a row may not."""
    if tensor.shape[1] <= 1 or tensor.stride(1) == 1:
        return tensor
    # Without entries, every tensor is contiguous already.
    return (
        tensor.contiguous() if tensor.numel() else torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    )

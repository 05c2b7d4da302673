"""What the selection's GPU backends share: counts on the device, and what they leave to the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from ..codes import MOST_ROWS
from ._selection import Selection, nan_error, remaining


def uncovered(selection: Selection) -> str | None:
    """Which part of the selection the GPU kernels do not solve."""
    for name, part in (("sizes", selection.sizes), ("pattern", selection.pattern)):
        if part:
            return f"it does not solve {name}"
    if selection.rows > MOST_ROWS:
        return f"it ranks up to {MOST_ROWS:,} rows, these are {selection.rows:,}"
    return "it solves one segment" if len(selection.segments) > 2 else None


def knows_all(selection: Selection) -> bool:
    """Whether the host need not know any value: nothing is checked then, and nothing waited for."""
    return selection.k.device.type != "cpu" and not selection.constrained


def counts(selection: Selection, excluded: list[Tensor]) -> tuple[Tensor, Tensor]:  # (rows,) each, int64
    """How many candidates to keep, and how many there are; on the device."""
    if knows_all(selection):
        return selection.k, torch.full_like(selection.k, selection.segments[-1])
    device = selection.values[0].device
    wanted, limits = remaining(selection, excluded)
    return torch.tensor(wanted, dtype=torch.int64, device=device), limits[2, :, 0].to(device)


def check_nan(
    selection: Selection,
    nan: Tensor,  # (rows, …) bool
) -> None:
    """Raises where a score was NaN; waits for the device."""
    rows: list[bool] = nan.reshape(selection.rows, nan[:1].numel()).any(dim=1).tolist()
    if not any(rows):
        return
    if selection.by_rows:
        raise nan_error(selection, rows.index(True))
    raise nan_error(selection, next(i for i, t in enumerate(selection.values) if bool(torch.isnan(t).any())))

"""Sums over what each coordinate governs: sizes, and scores from those of single weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from .axes import ROLES, Structure


def coordinate_sums(
    structure: Structure,
    values: Mapping[str, Tensor],
    roles: Collection[str] = ("gate", "producer"),
) -> Tensor:  # (C,) fp32, or fp64 if some values are
    """Σ of the values of all elements that a coordinate governs in these roles, accumulated in fp64.

    Of ``abs(w)`` the L1 norm of what goes with a channel, of ones how many weights do. An element between two
    coordinates counts for both.

    Args:
        structure: the coordinates.
        values: by the names of the structure's tensors, in their shapes; those not given count nothing.
        roles: of "gate", "producer" and "follower".

    Raises:
        ValueError: another role; a tensor of another size; no values for any coordinate.
    """
    if not set(roles) <= set(ROLES):
        raise ValueError(f"roles: wanted some of {ROLES}, got {tuple(roles)}")
    entries = [one for one in structure.entries if one.role in roles and one.tensor in values]
    if not entries:
        raise ValueError("values: wanted at least one tensor of the structure, got none")
    total = torch.zeros(structure.size, dtype=torch.float64, device=values[entries[0].tensor].device)
    for entry in entries:
        value = values[entry.tensor].detach()
        if value.dim() <= entry.dim or value.shape[entry.dim] != entry.index.numel():
            wanted = f"{entry.index.numel()} positions along dim {entry.dim}"
            raise ValueError(f"values: wanted {entry.tensor} with {wanted}, got shape {tuple(value.shape)}")
        others = [dim for dim in range(value.dim()) if dim != entry.dim]
        sums = value.sum(others, dtype=torch.float64) if others else value.double()
        index = entry.index.to(value.device)
        total.index_add_(0, index[index >= 0], sums[index >= 0])
    return total if any(values[one.tensor].dtype == torch.float64 for one in entries) else total.float()

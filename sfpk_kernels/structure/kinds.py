"""A structure of one kind of coordinates; those of others stay whole."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from .axes import CoordinateGroup, Structure


def only(structure: Structure, kind: str) -> Structure:
    """The groups of one kind, "channel", "head" or "neuron"; the others become protected.

    Raises:
        ValueError: there are none.
    """
    number = torch.full((structure.size,), -1, dtype=torch.int64, device="cpu")
    groups: list[CoordinateGroup] = []
    protected = dict(structure.protected)
    first = 0
    for group in structure.groups:
        if group.kind != kind:
            protected[group.name] = f"its {group.kind}s stay, those that may go are {kind}s"
            continue
        number[group.span] = torch.arange(first, first + group.size, dtype=torch.int64, device="cpu")
        groups.append(replace(group, first=first))
        first += group.size
    if not groups:
        found = ", ".join(sorted({f"{group.kind}s" for group in structure.groups}))
        raise ValueError(f"granularity: wanted what the model has, {found}, got {kind!r}")

    def renumbered(index: torch.Tensor) -> torch.Tensor:
        return torch.where(index < 0, -1, number[index.clamp_min(0)])

    def left(entries: tuple[Any, ...]) -> tuple[Any, ...]:
        made = (replace(one, index=renumbered(one.index)) for one in entries)
        return tuple(one for one in made if int(one.index.max()) >= 0)

    return Structure(
        tuple(groups), left(structure.entries), left(structure.norms), left(structure.attributes), protected
    )
